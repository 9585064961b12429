"""NVFlare as courier: mutual TLS between server and silos, and nothing of ours runs by it but two thin ends.

    NVFlare(kit)              what the server program hands to `Remote`
    serve_server, serve_client    keep the engine's own process of a kit running

The job is disposable. It is submitted when an exchange needs it, and again when it is lost or a silo came back that it
does not include: NVFlare fixes the members of a job at its start. State and models lie in the program and the workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import select
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

from fedtailor.engines import doctor, frames, nvflare_kit
from fedtailor.engines.courier import Answer, Head, Link, address, connect
from fedtailor.engines.nvflare_admin import Admin, Lost, Seen
from fedtailor.errors import FedtailorError, UserError
from fedtailor.packed import Packed

log = logging.getLogger("fedtailor.nvflare")

START = 60.0  # seconds that a job may take from submission to its first word
CHECK = 5.0  # seconds between two questions whether a job has failed to start
PAUSE = 30.0  # seconds after which a job with more members is tried again, where one could not start
GRACE = 15.0  # seconds beyond an exchange's time after which a job that says nothing is given up
ENDING = 10.0  # seconds that a process which was asked to end may take
ALONE = 30.0  # seconds that a courier goes on without a worker
ENDED = ("FINISHED", "FAILED", "ABORTED", "ABANDONED")  # how the status of a job that is over begins


@dataclass
class NVFlare:
    """A `Courier` over the federation whose server's kit this is. One exchange at a time; one program for a kit."""

    kit: Path
    patience: float = 120.0  # seconds that one exchange waits at most for the engine and the job, its timeout aside

    def __post_init__(self) -> None:
        nvflare_kit.needed()
        self.kit = self.kit.resolve()
        self.silos = tuple(sorted(nvflare_kit.about(self.kit, "server")["silos"]))
        self._held = locked(self.kit / ".program", "another program runs over this federation; wait for it, or end it")
        self._listening = listen(self.kit / nvflare_kit.SOCKET)
        self._link: Link | None = None
        self._job: dict[str, str] = {}  # the members of the running job, and by which token each was known at its start
        self._job_id, self._number = "", 0
        self._starting: Starting | None = None
        self._pause = 0.0  # until when no job with more members is tried
        self._admin = Admin(self.kit)

    def exchange(self, to: Sequence[str], head: Head, body: Packed, timeout: float) -> Iterator[Answer]:
        end, waiting = time.monotonic() + timeout, list(to)
        if not waiting:
            return
        try:
            link = self._ready(min(end, time.monotonic() + self.patience))
            for silo in self._missing(waiting):
                waiting.remove(silo)
                yield Answer(silo, lost="not connected to the server; its own log says why")
            self._number += 1
            seconds = max(0.05, end - time.monotonic())
            asked = {"kind": "exchange", "id": str(self._number), "to": waiting, "seconds": seconds, "head": head}
            link.until(seconds + GRACE)
            if waiting:
                frames.send(link, asked, body)
            while waiting:
                answer = self._received(link, waiting)
                if answer is not None:
                    waiting.remove(answer.silo)
                    yield answer
                del answer  # a large one is not held while the next one comes
        except (OSError, FedtailorError) as error:
            why = str(error) or "it said nothing in time"
            if self._starting is None:
                log.warning("the job is lost: %s", why)
            self._drop()
            for silo in waiting:
                yield Answer(silo, lost=f"NVFlare's job is lost: {why}")

    def __enter__(self) -> NVFlare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the job, and free the kit."""
        if self._starting is not None:
            self._admin.end(self._starting.job)
        self._drop()
        self._admin.close()
        self._listening.close()
        (self.kit / nvflare_kit.SOCKET).unlink(missing_ok=True)
        self._held.close()

    def _received(self, link: Link, waiting: Sequence[str]) -> Answer | None:
        """What comes next, None where that concerns no one that is waited for. Raises TimeoutError when time is up."""
        if not select.select([link], [], [], 1.0)[0]:
            if time.monotonic() > link.end:
                raise TimeoutError
            return next((Answer(silo, lost="its site went away") for silo in self._missing(waiting)), None)
        said, body = frames.receive(link, spool=self.kit / "spool")
        silo = str(said.get("silo"))
        if said.get("kind") != "answer" or said.get("id") != str(self._number) or silo not in waiting:
            return None  # a late answer to an exchange that was given up
        told = said.get("head")
        return Answer(silo, told if isinstance(told, dict) else {}, body, str(said.get("lost", "")))

    def _missing(self, silos: Sequence[str]) -> list[str]:
        """Those that the running job does not reach: not in it, or not at the server as they were when it began."""
        here = self._admin.here()
        return [s for s in silos if s not in self._job or (here is not None and _token(here, s) != self._job[s])]

    def _ready(self, end: float) -> Link:
        """A link to a job, with every silo in it that is connected as soon as may be. Raises Lost when there is none in time."""
        if self._link is not None and self._link.ended():
            self._drop()
        if self._link is None:
            if self._starting is None:
                self._submit(self._admin.gathered(self.silos, end))
            return self._greeted(end)
        try:  # the running job serves until one with more members is ready
            if self._starting is not None:
                return self._greeted(0.0)
            here = {silo: one for silo, one in (self._admin.here() or {}).items() if silo in self.silos}
            back = [silo for silo, one in here.items() if self._job.get(silo) != one.token]
            if back and time.monotonic() > self._pause:
                log.info("%s: back, so a job with it is submitted", ", ".join(back))
                self._submit(here)
        except Lost as error:
            log.warning("no job with all silos that are here: %s", error)
            self._starting, self._pause = None, time.monotonic() + PAUSE
        return self._link

    def _submit(self, here: Mapping[str, Seen]) -> None:
        number = os.urandom(8).hex()
        job = self._admin.submit(number, tuple(here))
        now = time.monotonic()
        self._starting = Starting(number, job, {silo: one.token for silo, one in here.items()}, now + START, now + CHECK)

    def _greeted(self, end: float) -> Link:
        """The link to the new job, once its server end has called: then all its members are ready. Until then the old one."""
        new = self._starting
        while new is not None:
            if select.select([self._listening], [], [], min(0.5, max(0.0, end - time.monotonic())))[0]:
                link = Link(fileno=self._listening.accept()[0].detach())
                link.until(5.0)
                with contextlib.suppress(OSError, FedtailorError):
                    said, _ = frames.receive(link, 0)
                    if said.get("job") == new.number:
                        self._drop()
                        self._link, self._job_id, self._starting = link, new.job, None
                        self._job = {silo: new.tokens[silo] for silo in said.get("silos", ()) if silo in new.tokens}
                        log.info("job %s runs with %s", new.job, ", ".join(self._job))
                        return link
                link.close()  # an older job, which is told by this to end
            now = time.monotonic()
            if now > new.end:
                self._starting = None
                self._admin.end(new.job)
                raise Lost("it did not start in time")
            if now > new.check:
                new.check = now + CHECK
                if (status := self._admin.status(new.job)).startswith(ENDED):
                    self._starting = None
                    raise Lost(f"it did not start ({status}): {self.kit / 'log.txt'} says why")
            if now >= end:
                break
        if self._link is None:
            raise Lost("it is still starting")
        return self._link

    def _drop(self) -> None:
        """The job ends by itself when its link is closed, if it still can."""
        if self._link is not None:
            self._link.close()
            self._admin.end(self._job_id)
        self._link, self._job = None, {}


def courier(kit: Path) -> NVFlare:
    """The courier of a server's kit, whose federation.toml says `engine = "nvflare"`."""
    return NVFlare(kit)


@dataclass
class Starting:
    """A job that was submitted and has not called yet."""

    number: str  # by which it is known when it calls
    job: str
    tokens: Mapping[str, str]  # of the silos that were connected then
    end: float  # when it is given up
    check: float  # when to ask next whether it has failed


def _token(here: Mapping[str, Seen], silo: str) -> str | None:
    return here[silo].token if silo in here else None


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


def serve_server(kit: Path) -> None:
    """Keep the engine's server of this kit running, until SIGTERM or SIGINT. Raises UserError where its port is taken."""
    port = int(nvflare_kit.about(kit, "server")["server"].rpartition(":")[2])
    log.info("the server of this federation starts at port %d; Ctrl-C ends it", port)
    _serve(kit, "server", "nvflare.private.fed.app.server.server_train", "fed_server.json", [], port=port)


def serve_client(kit: Path, worker: BinaryIO | None = None) -> None:
    """Keep the engine's client of this silo running, until SIGTERM or SIGINT. `worker` ends when the worker that started this
    is gone: the job goes on with the one that comes next, and where none comes this ends. One at a time: others wait."""
    about, holds = nvflare_kit.about(kit, "silo"), threading.Event()
    log.info("connecting to %s; `fedtailor doctor %s` tells whether that goes well", about["server"], kit)

    def watch(worker: BinaryIO) -> None:
        worker.read()
        end = time.monotonic() + ALONE
        while holds.is_set() and time.monotonic() < end:
            if _listens(nvflare_kit.worker_socket(kit)):
                end = time.monotonic() + ALONE
            time.sleep(1.0)
        signal.raise_signal(signal.SIGTERM)

    if worker is not None:
        threading.Thread(target=watch, args=(worker,), daemon=True).start()
    module = "nvflare.private.fed.app.client.client_train"
    _serve(kit, "silo", module, "fed_client.json", [f"uid={about['silo']}"], patience=math.inf, holds=holds)


def _listens(path: Path) -> bool:
    try:
        connect(path, 1.0).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True  # it is there, and busy
    return True


def _serve(
    kit: Path, kind: str, module: str, config: str, more: Sequence[str], *,
    port: int = 0, patience: float = ENDING, holds: threading.Event | None = None,
) -> None:  # fmt: skip
    nvflare_kit.needed()
    kit = kit.resolve()
    nvflare_kit.about(kit, kind)
    with locked(kit / ".engine", "its engine runs already; end that one first", patience):
        if holds is not None:
            holds.set()
        end_strays(kit)  # an engine whose keeper was killed still holds the port
        if port:
            _free(port)
        nvflare_kit.settle(kit, kind)
        settings = ["secure_train=true", f"org={nvflare_kit.ORG}", "config_folder=config", *more]
        command = [sys.executable, "-u", "-m", module, "-m", str(kit), "-s", config, "--set", *settings]
        stopping = threading.Event()
        before = {one: signal.signal(one, lambda *_: stopping.set()) for one in (signal.SIGTERM, signal.SIGINT)}

        def start() -> subprocess.Popen[bytes]:
            end_strays(kit)  # jobs of an engine that was killed: what they wait for does not come back
            for one in doctor.certificates(kit):
                if not one.fine:  # of the connection that fails by it, the engine tells no reason
                    log.error("certificate: %s", one.told)
            with (kit / "engine.log").open("w") as out:
                return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)

        try:
            _kept_running(start, stopping, f"the engine ended (%s) and is started again; {kit / 'engine.log'} says why")
        finally:
            end_strays(kit)
            for one, handler in before.items():
                signal.signal(one, handler)


def _free(port: int) -> None:
    with socket.socket() as trial:  # NVFlare would start all the same, and wait in silence
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; end what listens there (`ss -ltnp` shows it)") from None


@contextlib.contextmanager
def courier_beside(kit: Path) -> Iterator[None]:
    """A silo's courier in a process of its own, started again when it dies. Where this process is killed, the courier that
    runs is left to the one that comes next."""
    nvflare_kit.needed()
    nvflare_kit.about(kit, "silo")
    command = [sys.executable, "-c", "from fedtailor.cli import main; main()", "courier", str(kit)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE)  # it ends when this process is gone

    stopping = threading.Event()
    told = "the courier ended (%s) and is started again"
    keeping = threading.Thread(target=_kept_running, args=(start, stopping, told, 3 * ENDING))  # it ends its own first
    keeping.start()
    try:
        yield
    finally:
        stopping.set()
        keeping.join()


def _kept_running(
    start: Callable[[], subprocess.Popen[bytes]], stopping: threading.Event, told: str, patience: float = ENDING
) -> None:
    pause = 0.5
    while not stopping.is_set():
        began = time.monotonic()
        with start() as child:
            try:
                while child.poll() is None and not stopping.wait(0.2):
                    pass
            finally:
                if child.poll() is None:
                    child.terminate()
                    try:
                        child.wait(patience)
                    except subprocess.TimeoutExpired:
                        child.kill()
        if not stopping.is_set():
            pause = 0.5 if time.monotonic() - began > 60 else min(2 * pause, 30.0)
            log.warning(told, child.returncode)
            stopping.wait(pause)


def end_strays(kit: Path) -> None:
    """End the engine's processes of this kit: each is in a session of its own, and outlives what started it and was killed."""
    import psutil

    ended = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        line = process.info["cmdline"] or []
        ours = str(kit) in line and any(word.startswith("nvflare.private.fed.app.") for word in line)
        if ours and process.info["uids"].real == os.getuid():
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, 5)  # only then is a port free again
