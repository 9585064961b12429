"""Processes that are kept running, and what a kit holds for one process alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedtailor.engines import keeping
from fedtailor.engines.keeping import Kept
from fedtailor.errors import UserError

SLEEPS = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(60)"


def sleeper(folder: Path, name: str, **more: object) -> tuple[Kept, Callable[[], list[int]]]:
    """A process, and the numbers that it has had."""
    told = folder / name

    def numbers() -> list[int]:
        return [int(line) for line in told.read_text().split()] if told.exists() else []

    return Kept([sys.executable, "-c", SLEEPS, str(told)], folder / f"{name}.log", **more), numbers  # type: ignore[arg-type]


def looked(kept: list[Kept], until: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not until():
        assert time.monotonic() < end, "it did not come to that"
        for one in kept:
            one.look()
        time.sleep(0.05)


def test_what_ends_is_started_again_and_takes_along_what_cannot_go_on(tmp_path: Path) -> None:
    before: list[int] = []
    node, nodes = sleeper(tmp_path, "node", before=lambda: before.append(1))
    other, others = sleeper(tmp_path, "other")
    runs, ran = sleeper(tmp_path, "runs", takes=[node])
    kept = [node, other, runs]
    try:
        looked(kept, lambda: len(nodes()) == len(others()) == len(ran()) == 1)
        os.kill(ran()[0], 9)
        looked(kept, lambda: len(nodes()) == len(ran()) == 2)
        assert not psutil.pid_exists(nodes()[0])
        assert len(before) == 2
        os.kill(nodes()[1], 9)
        looked(kept, lambda: len(nodes()) == 3)
        assert (len(ran()), len(others())) == (2, 1)
    finally:
        for one in kept:
            one.stop()
    assert not [number for number in (*nodes(), *others(), *ran()) if psutil.pid_exists(number)]
    assert (tmp_path / "node.log").stat().st_mode & 0o077 == 0


def test_what_others_left_behind_is_ended_by_its_command_line(tmp_path: Path) -> None:
    kept, numbers = sleeper(tmp_path, "mine")
    looked([kept], lambda: len(numbers()) == 1)
    keeping.kill(lambda line: str(tmp_path / "theirs") in line)
    assert psutil.Process(numbers()[0]).status() != psutil.STATUS_ZOMBIE
    keeping.kill(lambda line: str(tmp_path / "mine") in line)
    assert not psutil.pid_exists(numbers()[0]), "gone, and nothing of it holds a port"
    kept.stop()


def test_a_kit_is_held_by_one_process(tmp_path: Path) -> None:
    with keeping.locked(tmp_path / ".engine", "taken"), pytest.raises(UserError, match=f"{tmp_path}: taken"):
        keeping.locked(tmp_path / ".engine", "taken")
    keeping.locked(tmp_path / ".engine", "free again").close()


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; end what listens there"):
            keeping.free(port)
    keeping.free(port)


def test_a_socket_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with keeping.listen(tmp_path / "one.sock"):
            assert (tmp_path / "one.sock").stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)


WAITS = """
import sys
from pathlib import Path
from fedtailor.engines import keeping
kit = Path(sys.argv[1])
def made():
    print("up", flush=True)
    return []
keeping.keep(kit, made, lambda: None, holds=keeping.ends_with(sys.stdin.buffer, kit))
"""


def test_a_courier_that_waits_for_its_workers_end_can_be_stopped_before(tmp_path: Path) -> None:
    """By Ctrl-C in a terminal, which goes to a whole process group: the worker's end is still open then."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == b"up\n"
    os.killpg(child.pid, signal.SIGINT)
    assert (child.wait(30), child.stderr.read()) == (0, b"")
    child.communicate()


def test_a_silo_whose_disk_is_full_says_so_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fedtailor.json").write_text('{"name": "f", "silo": "north", "server": "localhost:1", "engine": "none"}')
    for least, told in ((0, 0), (10**18, 1)):
        caplog.clear()
        monkeypatch.setattr(keeping, "LEAST", least)
        with keeping.courier_beside(tmp_path):
            pass
        lines = [line for line in caplog.messages if line.startswith(f"{tmp_path}: its disk has ")]
        assert len(lines) == told
