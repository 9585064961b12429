"""The two ends inside NVFlare's job: thin, without state that matters. The job may die at any moment; nothing is lost by it.

    server program <- unix socket -> ServerEnd <- NVFlare, mutual TLS -> SiloEnd <- unix socket -> worker

Bodies above `CHUNK` bytes cross in chunks and lie on disk at both ends, in files without a name: they go with the process.
Texts cross as hex of JSON: NVFlare puts its own values in the place of braces. Bodies cross as bytes: arrays take a way
with more turns (80 ms where bytes take 20).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.collab import collab
from nvflare.collab.api.context import get_call_context, set_call_context

from fedtailor.engines import courier, frames
from fedtailor.engines.answered import answered
from fedtailor.engines.nvflare_kit import SOCKET, worker_socket
from fedtailor.errors import FedtailorError, printable
from fedtailor.packed import nameless

CHUNK = 16 * 1024**2  # bytes of one call: NVFlare holds each about ten times over on its way

# Each end would import torch, if it is installed, to let tensors cross. None of ours does: 200 MB and 2 s saved.
sys.modules["nvflare.app_opt.pt.decomposers"] = None  # type: ignore[assignment]


class ServerEnd:
    """Takes exchanges from the server program, asks the silos, sends each answer back as it comes."""

    def __init__(self, spec: str = "7b7d") -> None:
        self.spec = spec  # NVFlare fills arguments by the attribute of the same name

    @collab.main  # type: ignore[untyped-decorator, unused-ignore]
    def run(self) -> None:
        kit = Path(collab.workspace.get_root_dir())
        silos = {one.name: one for one in collab.clients}
        with courier.connect(kit / SOCKET, 10.0) as link:
            frames.send(link, {"kind": "job", "job": unhex(self.spec)["job"], "silos": sorted(silos)})
            while not collab.is_aborted:
                if not select.select([link], [], [], 0.5)[0]:
                    continue
                body = spool(kit)
                link.until(600.0)
                try:
                    head, size = frames.receive_into(link, body)
                except frames.Closed:
                    return  # the program has ended, or wants another job
                Exchange(kit, silos, head, body, size).run(link)


class Exchange:
    """One message to several silos, a thread for each."""

    def __init__(self, kit: Path, silos: Mapping[str, Any], head: Mapping[str, Any], body: BinaryIO, size: int) -> None:
        self.kit, self.head, self.size, self.body = kit, head, size, body
        self.silos = {silo: silos[silo] for silo in head["to"]}
        self.end: float = time.monotonic() + head["seconds"]
        self.context = get_call_context()
        self.answers: queue.Queue[tuple[str, dict[str, Any], bytes | BinaryIO]] = queue.Queue()
        self.whole = pread(body, 0, size) if size <= CHUNK else b""

    def run(self, link: courier.Link) -> None:
        for silo in self.silos:
            threading.Thread(target=self._ask, args=(silo,), daemon=True).start()
        waiting = len(self.silos)
        while waiting and not collab.is_aborted and not select.select([link], [], [], 0)[0]:  # nobody waits any more
            with contextlib.suppress(queue.Empty):
                silo, said, body = self.answers.get(timeout=0.5)
                waiting -= 1
                link.until(600.0)
                frames.send(link, {"kind": "answer", "id": self.head["id"], "silo": silo, **said}, body)

    def _ask(self, silo: str) -> None:
        set_call_context(self.context)
        try:
            said, body = self._carried(silo)
        except ValueError as error:
            said, body = {"lost": printable(f"its answer is none of ours: {str(error)[:300]}")}, b""
        except Exception as error:
            late = getattr(error, "cause_type", "") == "TimeoutError" or time.monotonic() >= self.end
            why = f"no reply within {self.head['seconds']:.3g} s" if late else f"its courier failed: {str(error)[:300]}"
            said, body = {"lost": printable(why)}, b""
        self.answers.put((silo, said, body))

    def _carried(self, silo: str) -> tuple[dict[str, Any], bytes | BinaryIO]:
        proxy, key = self.silos[silo], self.head["id"]
        for offset in range(0, self.size if self.size > CHUNK else 0, CHUNK):
            proxy(timeout=self._left()).put(key, offset, pread(self.body, offset, CHUNK))
        text, whole = proxy(timeout=self._left()).ask(key, tohex(self.head["head"]), self._left(), self.whole)
        said, size = answered(bytes.fromhex(text))
        if size <= CHUNK:
            return said, blob(whole, size)
        body = spool(self.kit)
        while body.tell() < size:
            chunk = proxy(timeout=self._left()).get(key, body.tell())
            if not blob(chunk) or len(chunk) > size - body.tell():
                raise ValueError(f"it broke off after {body.tell()} of {size} bytes")
            body.write(chunk)
        return said, body

    def _left(self) -> float:
        return max(0.05, self.end - time.monotonic())


class SiloEnd:
    """Forwards what the server asks to this silo's worker. Nothing else of a silo can be reached through it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.down: tuple[str, BinaryIO] | None = None  # the request that is arriving in chunks
        self.up: tuple[str, BinaryIO] | None = None  # the reply that is fetched in chunks

    @collab.publish  # type: ignore[untyped-decorator, unused-ignore]
    def put(self, key: str, offset: int, chunk: Any) -> int:
        """One chunk of a request, in order. Returns the bytes there are now."""
        from_server()
        with self.lock:
            if offset == 0:
                self.down = (key, spool(kit()))
            if self.down is None or self.down[0] != key or self.down[1].seek(0, 2) != offset:
                raise ValueError(f"chunk at {offset} of a request that is not here up to there")
            if offset + len(chunk) > frames.BODY_LIMIT:
                raise ValueError(f"a request over the limit of {frames.BODY_LIMIT} bytes")
            return offset + self.down[1].write(blob(chunk))

    @collab.publish  # type: ignore[untyped-decorator, unused-ignore]
    def ask(self, key: str, head: str, seconds: float, body: Any) -> tuple[str, Any]:
        """The worker's answer; a large one is kept for `get`. What goes wrong is told in one line, without a traceback."""
        from_server()
        with self.lock:
            here = self.down[1] if self.down is not None and self.down[0] == key else None
            self.down = None
        try:
            answer, file, size = forwarded(kit(), unhex(head), here or blob(body), seconds)
        except TimeoutError:
            return tohex({"lost": f"no reply within {seconds:.3g} s"}), b""
        except (OSError, FedtailorError, ValueError) as error:
            return tohex({"lost": f"its worker cannot be reached: {str(error)[:300]}"}), b""
        whole = pread(file, 0, size) if size <= CHUNK else b""
        with self.lock:
            self.up = None if size <= CHUNK else (key, file)
        return tohex({"head": answer, "size": size}), whole

    @collab.publish  # type: ignore[untyped-decorator, unused-ignore]
    def get(self, key: str, offset: int) -> Any:
        from_server()
        with self.lock:
            if self.up is None or self.up[0] != key:
                raise ValueError("that reply is not here any more")
            return pread(self.up[1], offset, CHUNK)


def from_server() -> None:
    """Any member of a job may call any other: a silo answers the server alone. NVFlare binds the name to the certificate."""
    if collab.caller != "server":
        raise PermissionError(f"{collab.caller} is not the server")


def forwarded(kit: Path, head: Mapping[str, Any], body: bytes | BinaryIO, seconds: float) -> tuple[Any, BinaryIO, int]:
    """What the worker says. A worker of another silo is not asked: its rows would count under this one's name."""
    with courier.connect(worker_socket(kit), seconds) as link:
        frames.send(link, {"kind": "hello"})
        found = frames.receive(link, 0)[0].get("silo")
        if found != collab.site_name:
            raise FedtailorError(f"the worker there is of silo {found!r}, not of {collab.site_name!r}")
        courier.ask(link, head, body)
        file = spool(kit)
        answer, size = frames.receive_into(link, file)
    return answer, file, size


def blob(given: Any, size: int | None = None) -> bytes:
    """What came as bytes. Raises ValueError for anything else: of a number, `bytes` would make so many zeros."""
    if not isinstance(given, bytes | bytearray | memoryview) or (size is not None and len(given) != size):
        told = f"{len(given)} bytes, {size} announced" if isinstance(given, bytes) else f"a {type(given).__name__}"
        raise ValueError(f"its body is {told}")
    return bytes(given)


def kit() -> Path:
    return Path(collab.workspace.get_root_dir())


def spool(kit: Path) -> BinaryIO:
    """A file without a name in the kit's own folder: gone with the process that holds it."""
    return nameless(kit / "spool")


def pread(file: BinaryIO, offset: int, count: int) -> bytes:
    return os.pread(file.fileno(), count, offset)


def tohex(value: Any) -> str:
    return json.dumps(value).encode().hex()


def unhex(text: str) -> Any:
    return json.loads(bytes.fromhex(text))
