"""What tests of the command line share: `fedtailor(...)` in this process, and what it must say when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fedtailor import cli, progress

ROOT = Path(__file__).resolve().parents[1]


TINY = ROOT / "experiments" / "tiny.toml"


LABELLED = 'data.labels=["bad", "good"]'  # over a federation, no one reads all rows


FEDERATED = ("--set", 'rows=["federated"]')


PROCESS = [sys.executable, "-c", "from fedtailor.cli import main; main()"]


SLIM = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),
}  # a tiny model only waits for more threads


class Ended(NamedTuple):
    code: int
    out: str
    err: list[str]

    @property
    def errors(self) -> list[str]:
        """What is said of failures; the rest is progress."""
        return [line for line in self.err if line.startswith("fedtailor:")]


Command = Callable[..., Ended]


@pytest.fixture
def fedtailor(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err.splitlines())

    yield command
    progress.show(progress.Silent())


def fails(ended: Ended, code: int, *said: str) -> None:
    """One line of failure, with all of this in it, and no traceback."""
    assert ended.code == code, ended
    assert len(ended.errors) == 1, ended.err
    assert all(text in ended.errors[0] for text in said), ended.errors[0]
    assert not any("Traceback" in line or "a bug" in line for line in ended.err), ended.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


class Whole(NamedTuple):
    folder: Path
    ended: subprocess.CompletedProcess[str]
