"""Archives from a folder that pip takes for its index: no network. What an archive holds is never run."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedtailor import fetch
from fedtailor.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows one folder."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


def wheel(folder: Path, text: str = "hello") -> str:
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/words.txt", text)
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return fetch.sha256(path)


def sdist(folder: Path, setup: str) -> str:
    path = folder / "tinySource-2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 2.1\nName: tinySource\nVersion: 2.0\n")):
            member = tarfile.TarInfo(f"tinySource-2.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return fetch.sha256(path)


def left(cache: Path) -> list[str]:
    """Files in the cache."""
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()]


def no_pip(*_: object) -> subprocess.CompletedProcess[str]:
    raise AssertionError("a program was started, and what is in the cache needs none")


def test_a_wheel_once_then_offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = wheel(tmp_path / "index")
    path = fetch.package("tiny-data==1.0", sha, kind="wheel")
    assert path == cache / "packages" / sha / "tiny_data-1.0-py3-none-any.whl"
    assert zipfile.ZipFile(path).read("tiny_data/words.txt") == b"hello"
    assert left(cache) == [str(path.relative_to(cache))]
    monkeypatch.setattr(fetch, "_run", no_pip)
    assert fetch.package("tiny-data==1.0", sha, kind="wheel") == path


def test_a_damaged_file_is_fetched_anew(tmp_path: Path) -> None:
    sha = wheel(tmp_path / "index")
    path = fetch.package("tiny-data==1.0", sha, kind="wheel")
    path.write_bytes(path.read_bytes()[:50])
    assert fetch.sha256(fetch.package("tiny-data==1.0", sha, kind="wheel")) == sha


def test_setup_py_of_an_sdist_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was-run"
    sha = sdist(tmp_path / "index", f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n")
    path = fetch.package("tinySource==2.0", sha, kind="sdist")
    assert path.name == "tinySource-2.0.tar.gz"
    assert not trace.exists()


def test_another_hash_is_refused(cache: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "index")
    with pytest.raises(UserError, match=r"another SHA-256 than 0000.*it is not used"):
        fetch.package("tiny-data==1.0", "0" * 64, kind="wheel")
    assert left(cache) == []


def test_a_package_that_pip_cannot_find(cache: Path) -> None:
    with pytest.raises(UserError, match=r"gone==1.0: pip could not download it \(ERROR: .*\); check the network") as error:
        fetch.package("gone==1.0", "0" * 64, kind="wheel")
    assert "\n" not in str(error.value)
    assert left(cache) == []


def says(returncode: int, stderr: str) -> object:
    def run(command: Sequence[str], env: Mapping[str, str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_no_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\nERROR: No matching distribution"
    monkeypatch.setattr(fetch, "_run", says(1, pip))
    with pytest.raises(UserError, match=r"\(no connection to the index; ERROR: No matching distribution\)"):
        fetch.package("tiny==1.0", "0" * 64, kind="wheel")


def test_no_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_run", says(1, f"{sys.executable}: No module named pip"))
    with pytest.raises(UserError, match="-m ensurepip"):
        fetch.package("tiny==1.0", "0" * 64, kind="wheel")


def test_the_cache_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.cache_dir() == cache
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set FEDTAILOR_CACHE to a folder you may write to"):
        fetch.cache_dir()
    monkeypatch.delenv("FEDTAILOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_dir().name == "fedtailor"


def test_without_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get or dpkg-deb is not on this machine"), fetch.deb(["sed"]):
        pass


def test_apt_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fetch, "_run", says(100, "E: Could not resolve 'archive'"))
    with pytest.raises(UserError, match=r"apt-get update failed .*Could not resolve"), fetch.apt():
        pass
    assert left(cache) == []


def test_paragraphs_of_a_control_file() -> None:
    text = "Package: a\nTag: x::y,\n z::w\nDescription-en: short\n Long one.\n .\n More: of it.\n\nPackage: b\n\n"
    assert list(fetch.paragraphs(text)) == [
        {"Package": "a", "Tag": "x::y,\n z::w", "Description-en": "short\n Long one.\n .\n More: of it."},
        {"Package": "b"},
    ]
