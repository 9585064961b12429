"""A silo's own process: the resident base, the rows, the memory. It outlives runs, servers and whatever carries to it.

It listens on a unix socket that its owner alone may open, executes only installed `in_silo` functions, one at a time,
and writes memory and reply to disk together before it answers: killed at any moment, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedtailor import __version__, models, preparing, wire
from fedtailor import data as rows_of
from fedtailor.data import Data
from fedtailor.engines import courier, frames
from fedtailor.engines.desk import Desk, Done, Request, answer
from fedtailor.engines.site import Site
from fedtailor.errors import FedtailorError, SiloError, UserError
from fedtailor.packed import Packed, Spooled

log = logging.getLogger("fedtailor.silo")
OPEN = 8  # runs whose rows and memory are held at once
VERSIONS = {"fedtailor": __version__, "torch": torch.__version__}  # told in the head of a hello and of an opened


@dataclass(frozen=True)
class Open:
    """Down, before a run and after any restart: what a silo must know to take part. Nothing in it was learnt."""

    run: str
    seed: int
    data: Data  # the experiment's; the silo lays its own file, columns and limits over it
    model: models.Base
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the experiment's [silo.NAME] tables
    threads: int = 0
    fedtailor: str = __version__  # another version may compute something else under the same name
    libraries: Mapping[str, str] = field(default_factory=models.versions)


@dataclass(frozen=True)
class Opened:
    """Up: what the silo computes with. No count of rows, no text."""

    model_sha256: str
    tokenizer_sha256: str
    torch: str
    loads: int  # of base models since the worker began: 1, however many rounds


@dataclass(frozen=True)
class Kept:
    """A desk on disk, whole or not at all: so a reply and the memory after it are never apart. Large replies lie beside it,
    written before; a file that no desk names is swept away."""

    run: str
    rows_sha256: str
    round: int
    memory: Mapping[str, Any]
    done: Sequence[Mapping[str, Any]]


@dataclass
class Worker:
    """One silo's desks, one for each run it takes part in."""

    site: Site
    desks: dict[str, Desk] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> Path:
        return self.site.folder / "worker.sock"

    def serve(self, ready: Any = lambda: None) -> None:
        """Until the process ends. Raises UserError when another worker holds the folder."""
        self.site.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.site.folder.chmod(0o700)
        for package in self.site.allow:
            wire.allow(package)
        with (self.site.folder / ".lock").open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                why = f"{self.site.folder}: another worker runs there; end it, or give this one its own folder"
                raise UserError(why) from error
            self.address.unlink(missing_ok=True)
            shutil.rmtree(self.site.folder / "spool", ignore_errors=True)  # what a killed worker left there
            self._forget()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
                before = os.umask(0o177)
                try:
                    listening.bind(courier.address(self.address))
                finally:
                    os.umask(before)
                listening.listen()
                log.info("silo %s listens on %s", self.site.name, self.address)
                ready()
                while True:
                    link, _ = listening.accept()
                    threading.Thread(target=self._talk, args=(link,), daemon=True).start()

    def _talk(self, link: socket.socket) -> None:
        with link:
            try:
                while True:
                    head, body = frames.receive(link, self.site.body_limit, self.site.folder / "spool")
                    frames.send(link, *self.handle(head, body, lambda: courier.ended(link)))
            except frames.Closed:
                pass
            except (frames.FrameError, OSError) as error:
                log.warning("a connection was dropped: %s", error)
                if isinstance(error, frames.FrameError):  # asked again, it would be too large again
                    with contextlib.suppress(OSError):
                        frames.send(link, *_refused(str(error)))

    def handle(
        self, head: Mapping[str, Any], body: Packed, gone: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, Any], Packed]:
        """The answer to one message. What goes wrong here is told in full in this silo's log, and in short to the server.

        `gone`: whether who asked has given up meanwhile: what nobody waits for is not done, and holds up nothing.
        """
        try:
            kind = head.get("kind")
            if kind == "hello":
                return {"kind": "hello", "silo": self.site.name, "wire": wire.VERSION, **VERSIONS}, b""
            with self.lock:
                if gone():
                    raise frames.Closed("who asked has given up")
                if kind == "open":
                    found = self._open(wire.unpack(body))
                    return {"kind": "opened", "model_sha256": found.model_sha256, **VERSIONS}, wire.pack(found)
                if kind == "ask":
                    return self._ask(_request(head, body))
            return _refused(f"no message of kind {kind!r} is known here")
        except frames.Closed:
            raise
        except FedtailorError as error:
            log.error("%s", error)
            shown = isinstance(error, wire.WireError | SiloError | frames.FrameError)
            return _refused(str(error) if shown else "its own log says why")
        except OSError as error:
            log.error("%s: %s; mend it, and this silo takes part again", error.filename or self.site.folder, error.strerror)
            return _refused("its system refused something: its own log says what")
        except Exception as error:  # a message with a row in it may be inside: the server is told its kind alone
            if _out_of_memory(error):
                log.error("out of memory (%s); give this machine more, or ask for smaller batches", str(error)[:200])
                return _refused("out of memory")
            log.exception("unexpected %s", type(error).__name__)
            return _refused(f"unexpected {type(error).__name__}: its own log says where")

    def _open(self, body: Any) -> Opened:
        if not isinstance(body, Open):
            raise wire.WireError(f"a {type(body).__name__} opens nothing")
        if body.fedtailor != __version__:
            raise SiloError(f"fedtailor {__version__} is installed here, the server has {body.fedtailor}: install the same")
        for name, here in models.versions().items():
            asked = body.libraries.get(name, here)
            if here.split(".")[:2] != asked.split(".")[:2]:
                raise SiloError(f"{name} {here} is installed here, the server has {asked}: install the same")
        if body.threads:
            torch.set_num_threads(body.threads)
        rows = self.site.rows(body.data, body.settings.get(self.site.name, {}), body.seed)
        resident = models.load(self.site.base(body.model))
        preparing.fits(resident, {self.site.name: rows})  # the template is tried on every row before anything is trained
        known, spool = self._read(body.run), self._file(body.run).with_suffix("")
        digest = rows_of.sha256({self.site.name: replace(rows, corpus=None)})  # documents may change while a run goes on
        desk = Desk(self.site.name, rows, {"base": resident}, body.seed, spool=spool, rows_sha256=digest)
        if known is not None:
            if known.rows_sha256 != digest:
                raise SiloError("the rows here changed since this run began; bring them back, or begin a new run")
            desk.round, desk.memory = known.round, dict(known.memory)
            desk.done = [_done(one, desk) for one in known.done]
        self.desks.pop(body.run, None)
        self.desks[body.run] = desk
        while len(self.desks) > OPEN:  # one that goes on after all is opened again, from its file
            del self.desks[next(iter(self.desks))]
        log.info("run %s is open: %d rows to train on", body.run, len(rows.train))
        return Opened(resident.sha256, resident.tokenizer_sha256, torch.__version__, models.loads())

    def _ask(self, request: Request) -> tuple[dict[str, Any], Packed]:
        desk = self.desks.get(request.run)
        if desk is None:  # a worker that came back: it must be told of the run again
            return {"kind": "unknown"}, b""
        known = desk.recorded(request)
        if known is None:
            try:
                (known,) = answer([desk], request)
                if wire.find_work(request.work).__memory__:  # else nothing changed: asked again, it is done again
                    self._write(request.run, desk)
            except FedtailorError:
                raise
            except BaseException:  # what is not on the disk did not happen: begin again from there
                del self.desks[request.run]
                raise
        return {"kind": "reply", "id": request.id(self.site.name)}, known

    def _file(self, run: str) -> Path:
        return self.site.folder / "memory" / f"{hashlib.sha256(run.encode()).hexdigest()[:24]}.safetensors"

    def _read(self, run: str) -> Kept | None:
        file = self._file(run)
        found = wire.read_file(file) if file.exists() else None
        return found if isinstance(found, Kept) and found.run == run else None

    def _write(self, run: str, desk: Desk) -> None:
        self._file(run).parent.mkdir(exist_ok=True)
        done = [_kept(one) for one in desk.done]
        wire.write_file(self._file(run), Kept(run, desk.rows_sha256, desk.round, desk.memory, done))
        if desk.spool is not None and desk.spool.exists():
            named = {desk.reply(one.id) for one in desk.done}
            for file in desk.spool.iterdir():
                if file not in named:
                    file.unlink()

    def _forget(self) -> None:
        """Runs that have not gone on for `keep_days` are forgotten: of most, the server never says that they ended."""
        for file in (self.site.folder / "memory").glob("*.safetensors"):
            if time.time() - file.stat().st_mtime > 86400 * self.site.keep_days:
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink()
                log.info("a run that has not gone on for %d days is forgotten: %s", self.site.keep_days, file.name)


def _request(head: Mapping[str, Any], body: Packed) -> Request:
    kinds = {"run": str, "round": int, "index": int, "work": str, "committed": int}
    for name, kind in kinds.items():
        if type(head.get(name)) is not kind:
            raise wire.WireError(f"a request's {name} must be {kind.__name__}, not {head.get(name)!r:.80}")
    bounds = {"round": (0, 10**9), "index": (0, 10_000), "committed": (-1, 10**9)}
    for name, (low, high) in bounds.items():
        if not low <= head[name] <= high:
            raise wire.WireError(f"a request's {name} must be from {low} to {high}, not {head[name]!r:.80}")
    return Request(head["run"], head["round"], head["index"], head["work"], body, head["committed"])


def _kept(one: Done) -> dict[str, Any]:
    if isinstance(one.reply, Spooled):  # in a file by the request's id
        return {"id": one.id, "reply": None, "memory": one.memory}
    reply = torch.frombuffer(bytearray(one.reply), dtype=torch.uint8) if one.reply else None
    return {"id": one.id, "reply": reply, "memory": one.memory}


def _done(kept: Mapping[str, Any], desk: Desk) -> Done:
    if kept["reply"] is not None:
        return Done(kept["id"], kept["reply"].numpy().tobytes(), kept["memory"])
    file = desk.reply(kept["id"])
    return Done(kept["id"], Spooled(file.open("rb", buffering=0)) if file.exists() else None, kept["memory"])


def _out_of_memory(error: Exception) -> bool:
    """torch tells a processor's want of memory as a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _refused(why: str) -> tuple[dict[str, Any], Packed]:
    return {"kind": "refused", "why": why}, b""
