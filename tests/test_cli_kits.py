"""The command line over kits: what is wrong is told in one line, and Ctrl-C ends all that was started."""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from background import free_port, left, wait_for
from commands import LABELLED, PROCESS, SLIM, TINY, Command, fails
from fedtailor import cli
from fedtailor.engines import courier, nvflare_kit
from fedtailor.errors import UserError

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Path]:
    return nvflare_kit.init(tmp_path / "kits", "demo", f"localhost:{free_port()}", ["north", "south"])


def test_a_servers_kit_is_no_silos(kits: dict[str, Path], fedtailor: Command) -> None:
    fails(fedtailor("silo", kits["server"]), 2, f"{kits['server']}: not the kit of a silo; choose the silo's own folder")


def test_a_server_whose_port_is_taken_does_not_say_that_it_starts(kits: dict[str, Path]) -> None:
    port = int(nvflare_kit.about(kits["server"], "server")["server"].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run(
            [*PROCESS, "server", str(kits["server"])], env=SLIM, capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedtailor: port {port}: Address already in use; ")


def test_a_check_goes_on_beside_a_run(kits: dict[str, Path], fedtailor: Command) -> None:
    """The run holds the kit; a check needs the silos' names alone."""
    with courier.of(kits["server"]) as held:
        ended = fedtailor("check", TINY, "--federation", kits["server"], "--set", LABELLED)
        assert ended.code == 0, ended.err
        assert "silos, each with rows of its own: north, south" in ended.out
        assert held.silos == courier.names(kits["server"])


def test_a_kit_whose_socket_cannot_be_made_is_not_held(kits: dict[str, Path], tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    kits["server"].rename(deep / "server")
    for _ in range(2):
        with pytest.raises(UserError, match="too long for a socket's path") as kept:  # as is what holds the frames
            courier.of(deep / "server")
        del kept


def test_a_command_that_is_none_is_meant_once(fedtailor: Command) -> None:
    ended = fedtailor("federation", "int")
    fails(ended, 2, "No such command 'int'")
    assert ended.errors[0].count("Did you mean") == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT])
def test_only_a_run_is_told_of_its_options(code: int) -> None:
    error = OSError(code, "refused", "/kits/north")
    told = cli._system(error, run=False)
    assert told.startswith("/kits/north: ")
    assert "--" not in told
    assert "--" in cli._system(error, run=True)


@pytest.mark.engines
def test_ctrl_c_in_a_terminal_ends_a_silo_and_its_courier(kits: dict[str, Path]) -> None:
    """It goes to every process of the terminal's group at once."""
    hears, kit = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), kits["north"]
    with (kit / "test.log").open("w") as log:
        child = subprocess.Popen(
            [*PROCESS, "silo", str(kit)], env=SLIM, stderr=log, stdout=log, start_new_session=True, preexec_fn=hears
        )
    try:
        up = wait_for(lambda: (kit / "engine.log").exists() and (kit / "silo" / "worker.sock").exists(), 90)
        assert up, (kit / "test.log").read_text()
    finally:
        os.killpg(child.pid, signal.SIGINT)
        child.wait(60)
    said = (kit / "test.log").read_text()
    assert (child.returncode, left(kit)) == (0, []), said
    assert "stopped; what was learnt of open runs is kept in" in said
    assert "Fatal Python error" not in said
    assert "Traceback" not in said
