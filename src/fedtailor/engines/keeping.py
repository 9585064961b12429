"""An engine's own processes of a kit, kept running until SIGTERM or SIGINT; and what a kit holds for one process alone.

    keep           the engine's processes, in the keeper's own process: `fedtailor server`, or the courier of a silo
    courier_beside, ends_with    that courier in a process of its own beside the worker, which outlives neither for long
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from fedtailor.engines.courier import address, connect
from fedtailor.engines.kit import worker_socket
from fedtailor.errors import UserError

log = logging.getLogger("fedtailor.engine")

ENDING = 10.0  # seconds that a process which was asked to end may take
ALONE = 30.0  # seconds that a courier goes on without a worker
LEAST = 50 * 10**6  # bytes free on a kit's disk: below, logs and memories are soon cut off
LONG = 60.0  # seconds after which a process counts as having worked: when it ends, it is started again at once


@dataclass
class Kept:
    """One process, in a session of its own; its output goes to `log`."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    before: Callable[[], None] = lambda: None  # done each time before it is started
    most: float = 30.0  # seconds to wait before it is started again: doubled each time that it ends soon, up to this
    takes: Sequence[Kept] = ()  # processes that cannot go on without it: when it ends, they are started anew, too

    def __post_init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._began, self._due, self._pause = 0.0, 0.0, 0.5

    def look(self) -> None:
        """Start it where it does not run and is due."""
        now = time.monotonic()
        if self._child is None:
            if now >= self._due:
                self._start()
        elif self._child.poll() is not None:
            code, self._child = self._child.returncode, None
            self._pause = 0.5 if now - self._began > LONG else min(2 * self._pause, self.most)
            self._due = now + self._pause
            log.warning("%s ended (%s) and is started again; %s says why", self.log.stem, code, self.log)
            for other in self.takes:
                other.stop()

    def _start(self) -> None:
        self.before()
        self._began = time.monotonic()
        self.log.touch(0o600)
        with self.log.open("w") as out:
            self._child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment,
                start_new_session=True, umask=0o077,
            )  # fmt: skip

    def stop(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(ENDING)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child = None


def keep(
    kit: Path, made: Callable[[], Sequence[Kept]], end_strays: Callable[[], None], *,
    port: int = 0, patience: float = ENDING, holds: threading.Event | None = None,
) -> None:  # fmt: skip
    """Keep these processes running, until SIGTERM or SIGINT. Raises UserError where they run already, or the port is taken.

    `end_strays` ends what an earlier keeper, killed, left behind: it would still hold the port. patience: seconds to wait for
    another keeper's end; `holds` is set once this one is it.
    """
    with locked(kit / ".engine", "its engine runs already; end that one first", patience):
        if holds is not None:
            holds.set()
        stopping = threading.Event()
        before = {one: signal.signal(one, lambda *_: stopping.set()) for one in (signal.SIGTERM, signal.SIGINT)}
        processes: Sequence[Kept] = ()
        try:
            end_strays()
            if port:
                free(port)
            processes = made()
            while not stopping.is_set():
                for process in processes:
                    process.look()
                stopping.wait(0.2)
        finally:
            for process in reversed(processes):
                process.stop()
            end_strays()
            for one, handler in before.items():
                signal.signal(one, handler)


@contextlib.contextmanager
def courier_beside(kit: Path) -> Iterator[None]:
    """A silo's courier in a process of its own, started again when it dies. Where this process is killed, the courier that
    runs is left to the one that comes next."""
    if (room := shutil.disk_usage(kit).free) < LEAST:
        log.warning("%s: its disk has %.0f MB left; free some space, or this silo cannot answer", kit, room / 1e6)
    stopping = threading.Event()
    keeping = threading.Thread(target=_courier_kept, args=(kit, stopping))
    keeping.start()
    try:
        yield
    finally:
        stopping.set()
        keeping.join()


def _courier_kept(kit: Path, stopping: threading.Event) -> None:
    command, pause = [sys.executable, "-c", "from fedtailor.cli import main; main()", "courier", str(kit)], 0.5
    while not stopping.is_set():
        began = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:  # its input ends when this process is gone
            try:
                while child.poll() is None and not stopping.wait(0.2):
                    pass
            finally:
                if child.poll() is None:
                    child.terminate()
                    try:
                        child.wait(3 * ENDING)  # it ends its own first
                    except subprocess.TimeoutExpired:
                        child.kill()
        if not stopping.is_set():
            pause = 0.5 if time.monotonic() - began > LONG else min(2 * pause, 30.0)
            log.warning("the courier ended (%s) and is started again", child.returncode)
            stopping.wait(pause)


def ends_with(worker: BinaryIO | None, kit: Path) -> threading.Event:
    """Ask this process to end once no worker of the kit is there any more: `worker` ends when the one that started this is
    gone; it goes on with one that comes next. Returns what is to be set when this is the courier: one that waits to be ends."""
    holds = threading.Event()

    def watch(worker: BinaryIO) -> None:
        while os.read(worker.fileno(), 4096):  # no buffer: Python aborts at its end where a thread holds one
            pass
        end = time.monotonic() + ALONE
        while holds.is_set() and time.monotonic() < end:
            if _listens(worker_socket(kit)):
                end = time.monotonic() + ALONE
            time.sleep(1.0)
        signal.raise_signal(signal.SIGTERM)

    if worker is not None:
        threading.Thread(target=watch, args=(worker,), daemon=True).start()
    return holds


def _listens(path: Path) -> bool:
    try:
        connect(path, 1.0).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True  # it is there, and busy
    return True


def kill(ours: Callable[[list[str]], bool]) -> None:
    """End this user's processes of which `ours(command line)` holds."""
    import psutil

    ended = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        if ours(process.info["cmdline"] or []) and process.info["uids"].real == os.getuid():
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, 5)  # only then is a port free again


def free(port: int) -> None:
    """Raises UserError where something listens at this port."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; end what listens there (`ss -ltnp` shows it)") from None


def listen(path: Path) -> socket.socket:
    """A socket that only its owner may open."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(address(path))
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(before)
    listening.listen()
    return listening


def locked(file: Path, why: str, patience: float = 0.0) -> TextIO:
    """Held as long as the file is open. Raises UserError when another process holds it for `patience` seconds."""
    file.touch(0o600)
    held, end = file.open("w"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except OSError:
            if time.monotonic() >= end:
                held.close()
                raise UserError(f"{file.parent}: {why}") from None
            time.sleep(0.2)
