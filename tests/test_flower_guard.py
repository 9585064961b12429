"""No code of an app: what the guard lets in, in an interpreter of its own, for a hook stays for good."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import tomli_w

from fedtailor.engines.flower_kit import APP

RUN = """
import pathlib, shutil, sys
from fedtailor.engines.flower_guard import guard
apps, source = map(pathlib.Path, sys.argv[1:3])
sys.addaudithook(guard(apps))
shutil.copytree(source, apps / "one")  # as Flower unpacks an app
sys.path.insert(0, str(apps / "one"))
{then}
"""


def app(folder: Path, **change: object) -> Path:
    table = APP | change
    (folder / "source").mkdir()
    (folder / "source" / "pyproject.toml").write_text(tomli_w.dumps(table))
    (folder / "source" / "evil.py").write_text("print('evil ran')")
    return folder


def guarded(folder: Path, then: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(then=then), str(folder / "apps"), str(folder / "source")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_our_own_description_is_read(tmp_path: Path) -> None:
    ended = guarded(app(tmp_path), "print((apps / 'one' / 'pyproject.toml').read_text()[:9])")
    assert ended.stdout == "[project]\n", ended.stderr


@pytest.mark.parametrize(
    "then",
    [
        "import evil",
        "exec((apps / 'one' / 'evil.py').read_text())",
        "import runpy; runpy.run_path(str(apps / 'one' / 'evil.py'))",
        "import os; os.chdir(apps); exec(open('one/evil.py').read())",
        "import os; os.chdir(apps); exec(open(b'one/../one/evil.py', 'rb').read())",
        "import os; exec(os.read(os.open(apps / 'one' / 'evil.py', os.O_RDONLY), 100))",
        "import os; (apps / 'link').symlink_to(apps / 'one'); exec((apps / 'link' / 'evil.py').read_text())",
        "link = source / 'link'; link.symlink_to(apps / 'one' / 'evil.py'); exec(link.read_text())",
        "import ctypes; ctypes.CDLL(str(apps / 'one' / 'evil.so'))",
    ],
)
def test_no_other_file_of_an_app_is_read(then: str, tmp_path: Path) -> None:
    """Even where the description is ours."""
    folder = app(tmp_path)
    (folder / "source" / "evil.so").touch()
    ended = guarded(folder, then)
    assert ended.returncode != 0
    assert "PermissionError" in ended.stderr
    assert "nothing of it is run here" in ended.stderr
    assert "evil ran" not in ended.stdout


def test_a_library_of_an_app_is_not_loaded(tmp_path: Path) -> None:
    folder = app(tmp_path)
    name = f"library{EXTENSION_SUFFIXES[0]}"
    (folder / "source" / name).touch()
    ended = guarded(folder, "import library")
    assert "nothing of it is run here" in ended.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"tool": {"flwr": {"app": {"components": {"serverapp": "evil:server", "clientapp": "evil:client"}}}}},
        {"tool": {"flwr": {"app": {"components": {"agentapp": "evil:agent"}}}}},
        {"project": {"name": "fedtailor", "version": "1.0.0", "dependencies": ["evil"]}},
    ],
)
def test_another_description_is_not_read(change: dict[str, object], tmp_path: Path) -> None:
    ended = guarded(app(tmp_path, **change), "print((apps / 'one' / 'pyproject.toml').read_text())")
    assert "nothing of it is run here" in ended.stderr
    assert ended.stdout == ""
