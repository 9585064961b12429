"""What carries messages between the server program and the workers of the silos; and the plainest: unix sockets.

A courier knows heads and bytes, no methods, no rounds. It may lose any message: who asks, asks again.
"""

from __future__ import annotations

import contextlib
import importlib
import select
import socket
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fedtailor.engines import frames
from fedtailor.engines import kit as kits
from fedtailor.errors import UserError, suggest
from fedtailor.packed import Packed

Head = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back from one silo: a message, or why none did."""

    silo: str
    head: Head = field(default_factory=dict)
    body: Packed = b""
    lost: str = ""


class Courier(Protocol):
    @property
    def silos(self) -> tuple[str, ...]: ...  # whom it can reach, in order

    def __enter__(self) -> Courier: ...
    def __exit__(self, *_: object) -> None: ...  # what it holds is free again

    def exchange(self, to: Sequence[str], head: Head, body: Packed, timeout: float) -> Iterator[Answer]:
        """The same message to several silos; one Answer each, as they come, within `timeout` seconds."""
        ...


@dataclass(frozen=True)
class Sockets:
    """Workers of this machine, by the unix sockets they listen on."""

    paths: Mapping[str, Path]
    spool: Path | None = None  # a folder for large answers

    @property
    def silos(self) -> tuple[str, ...]:
        return tuple(sorted(self.paths))

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held: every exchange makes its own links."""

    def exchange(self, to: Sequence[str], head: Head, body: Packed, timeout: float) -> Iterator[Answer]:
        pool = ThreadPoolExecutor(max_workers=max(1, len(to)))
        try:
            for done in as_completed([pool.submit(self._one, silo, head, body, timeout) for silo in to]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, silo: str, head: Head, body: Packed, timeout: float) -> Answer:
        try:
            with connect(self.paths[silo], timeout) as link:
                ask(link, head, body)
                return Answer(silo, *frames.receive(link, spool=self.spool))
        except TimeoutError:
            return Answer(silo, lost=f"no reply within {timeout:.3g} s")
        except (OSError, frames.FrameError) as error:
            return Answer(silo, lost=f"its worker cannot be reached: {error}")


def of(kit: Path) -> Courier:
    """The courier that a kit's federation.toml names: `engine = "sockets"` and `[silos]`, name = path of its socket.

    Any other engine is the module of that name beside this one, whose `courier(kit)` makes it. Raises UserError.
    """
    file, engine, silos = _told(kit)
    if engine == "sockets":
        return Sockets({name: file.parent / str(path) for name, path in silos.items()}, file.parent / "spool")
    found: Courier = importlib.import_module(f"fedtailor.engines.{engine}").courier(file.parent)
    return found


def names(kit: Path) -> tuple[str, ...]:
    """The silos that `of` would reach, in order; nothing of the kit is held. Raises UserError as `of` does."""
    file, engine, silos = _told(kit)
    return tuple(sorted(silos if engine == "sockets" else kits.about(file.parent, "server")["silos"]))


def _told(kit: Path) -> tuple[Path, str, Mapping[str, Any]]:
    """A kit's federation.toml, its engine, and the paths of `[silos]`, which sockets alone have."""
    from fedtailor import find  # brings torch in, which what carries alone does without

    file = kit / "federation.toml" if kit.is_dir() else kit
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--federation {kit}: {file.name} cannot be read ({error})") from error
    engine, silos = table.get("engine"), table.get("silos")
    if engine == "sockets":
        if not isinstance(silos, dict) or not silos:
            raise UserError(f"{file}: [silos] is missing; write one line for each silo: name = 'path of its worker.sock'")
        return file, engine, silos
    known = [name for name in find.names("fedtailor.engines") if name == "nvflare" or name == "flower"]
    if engine not in known:
        raise UserError(f"{file}: engine = {engine!r}: no such engine{suggest(str(engine), ['sockets', *known])}")
    return file, str(engine), {}


def ask(link: socket.socket, head: Head, body: Packed | BinaryIO) -> None:
    """Send a request. A worker that does not read it to the end has said why, and that is there to be received."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        frames.send(link, head, body)


def connect(path: Path, timeout: float) -> Link:
    """A link to a worker. It waits no longer than `timeout` in all: each wait takes what is left."""
    link = Link(socket.AF_UNIX, socket.SOCK_STREAM)
    link.until(timeout)
    try:
        link.connect(address(path))
    except BaseException:
        link.close()
        raise
    return link


def ended(link: socket.socket) -> bool:
    """Whether the other side has closed it. Nothing that came is read."""
    try:
        return bool(select.select([link], [], [], 0)[0]) and not link.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


class Link(socket.socket):
    """A socket whose waits share one time limit."""

    end = 0.0

    def until(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.settimeout(seconds)

    def ended(self) -> bool:
        return ended(self)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(max(0.001, self.end - time.monotonic()))
        return super().recv_into(*args)


def address(path: Path) -> str:
    """The socket's path as the system takes it. Raises UserError where it is too long for a unix socket (104 bytes)."""
    text = str(path)
    if len(text.encode()) > 103:
        raise UserError(f"{path}: too long for a socket's path (103 bytes at most); choose a folder nearer to the root")
    return text
