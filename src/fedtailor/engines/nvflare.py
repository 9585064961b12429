"""NVFlare as courier: mutual TLS between server and silos, and nothing of ours runs by it but two thin ends.

    NVFlare(kit)              what the server program hands to `Remote`
    serve_server, serve_client    keep the engine's own process of a kit running

The job is disposable. It is submitted when an exchange needs it, and again when it is lost or a silo came back that it
does not include: NVFlare fixes the members of a job at its start. State and models lie in the program and the workers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedtailor.engines import doctor, nvflare_admin, nvflare_kit
from fedtailor.engines.courier import Answer, Head, Link
from fedtailor.engines.keeping import Kept, ends_with, keep, kill
from fedtailor.engines.nvflare_admin import Admin, Lost, Seen
from fedtailor.engines.program import Program
from fedtailor.errors import FedtailorError
from fedtailor.packed import Packed

log = logging.getLogger("fedtailor.nvflare")

START = 60.0  # seconds that a job may take from submission to its first word
CHECK = 5.0  # seconds between two questions whether a job has failed to start
PAUSE = 30.0  # seconds after which a job with more members is tried again, where one could not start
needed = nvflare_kit.needed
ENDED = ("FINISHED", "FAILED", "ABORTED", "ABANDONED")  # how the status of a job that is over begins

JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # the name of a job, and of its folders


@dataclass
class NVFlare:
    """A `Courier` over the federation whose server's kit this is. One exchange at a time; one program for a kit."""

    kit: Path
    patience: float = 120.0  # seconds that one exchange waits at most for the engine and the job, its timeout aside

    def __post_init__(self) -> None:
        nvflare_kit.needed()
        self.kit = self.kit.resolve()
        self.silos = tuple(sorted(nvflare_kit.about(self.kit, "server")["silos"]))
        self._program = Program(self.kit)
        self._link: Link | None = None
        self._job: dict[str, str] = {}  # the members of the running job, and by which token each was known at its start
        self._job_id = ""
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
            yield from self._program.exchange(link, waiting, head, body, end, self._missing)
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
        self._program.close()

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
            called = self._program.called(new.number, min(0.5, end - time.monotonic()))
            if called is not None:
                link, said = called
                self._drop()
                self._link, self._job_id, self._starting = link, new.job, None
                self._job = {silo: new.tokens[silo] for silo in said.get("silos", ()) if silo in new.tokens}
                log.info("job %s runs with %s", new.job, ", ".join(self._job))
                return link
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


def seen(kit: Path) -> dict[str, float]:
    """When each silo that is connected was last seen. Raises Lost when the server does not answer."""
    return {silo: one.seen for silo, one in nvflare_admin.look(kit).items()}


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


def serve_server(kit: Path) -> None:
    """Keep the engine's server of this kit running, until SIGTERM or SIGINT. Raises UserError where its port is taken."""
    needed()
    port = int(nvflare_kit.about(kit, "server")["server"].rpartition(":")[2])
    kept = _engine(kit, "server", "nvflare.private.fed.app.server.server_train", "fed_server.json", [])

    def made() -> list[Kept]:
        log.info("the server of this federation starts at port %d; Ctrl-C ends it", port)
        return kept()

    # where the port is taken, NVFlare would start all the same, and wait in silence
    keep(kit.resolve(), made, lambda: end_strays(kit.resolve()), port=port)


def serve_client(kit: Path, worker: BinaryIO | None = None) -> None:
    """Keep the engine's client of this silo running, until SIGTERM or SIGINT, or until its worker is gone: see `ends_with`."""
    needed()
    about = nvflare_kit.about(kit, "silo")
    log.info("connecting to %s; `fedtailor doctor %s` tells whether that goes well", about["server"], kit)
    kept = _engine(kit, "silo", "nvflare.private.fed.app.client.client_train", "fed_client.json", [f"uid={about['silo']}"])
    keep(kit.resolve(), kept, lambda: end_strays(kit.resolve()), patience=math.inf, holds=ends_with(worker, kit))


def _engine(kit: Path, kind: str, module: str, config: str, more: Sequence[str]) -> Callable[[], list[Kept]]:
    kit = kit.resolve()

    def before() -> None:
        end_strays(kit)
        sweep(kit)
        for one in doctor.certificates(kit):
            if not one.fine:  # of the connection that fails by it, the engine tells no reason
                log.error("certificate: %s", one.told)

    def made() -> list[Kept]:
        nvflare_kit.settle(kit, kind)
        settings = ["secure_train=true", f"org={nvflare_kit.ORG}", "config_folder=config", *more]
        command = [sys.executable, "-u", "-m", module, "-m", str(kit), "-s", config, "--set", *settings]
        return [Kept(command, kit / "engine.log", before=before)]

    return made


def sweep(kit: Path) -> None:
    """Remove what ended jobs left in a kit whose engine does not run: it keeps every job's files for ever.

    A server's kit tells in jobs/ which have ended; at a silo none goes on. What has no job's name is left alone.
    """
    ended = {job.name for job in _jobs(kit / "jobs") if _has_ended(job)}
    for job in [*_jobs(kit / "jobs"), *_jobs(kit)]:
        if job.name in ended or not (kit / "jobs" / job.name).exists():
            shutil.rmtree(job, ignore_errors=True)


def _jobs(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [one for one in found if JOB.fullmatch(one.name) and one.is_dir() and not one.is_symlink()]


def _has_ended(job: Path) -> bool:
    try:
        return str(json.loads((job / "meta").read_text(encoding="utf-8"))["status"]).startswith(ENDED)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def end_strays(kit: Path) -> None:
    """End the engine's processes of this kit: each is in a session of its own, and outlives what started it and was killed.

    What jobs of an engine that was killed wait for does not come back.
    """
    kill(lambda line: str(kit) in line and any(word.startswith("nvflare.private.fed.app.") for word in line))
