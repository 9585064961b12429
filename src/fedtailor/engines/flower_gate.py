"""The one door of a Flower server: what silos' nodes need passes, all else of Flower's server is closed to the network.

    python -m fedtailor.engines.flower_gate KIT PORT        in front of the SuperLink that listens at 127.0.0.1:PORT

Flower serves three interfaces on one port. Nodes sign every call to the first, /v1/fleet; the others start runs and
register nodes for anyone who holds the CA's certificate, so they are reached on this machine alone.
"""

from __future__ import annotations

import logging
import re
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedtailor.engines import kit as kits
from fedtailor.engines.flower_kit import LOCAL

OPEN = re.compile(r"/v1/fleet/[a-z-]{1,40}")
LIMIT = 64 * 1024**2  # bytes of one call: Flower carries bodies in pieces of 5 MB
HERE = (b"host", b"connection", b"content-length", b"transfer-encoding", b"expect", b"accept-encoding")  # of one leg alone

Scope = MutableMapping[str, Any]
Call = Callable[[], Awaitable[Scope]]
Say = Callable[[Scope], Awaitable[None]]


class Gate:
    """An ASGI application: forwards what `OPEN` names, answers 404 to all else."""

    def __init__(self, address: str, ca: Path) -> None:
        trusted = ssl.create_default_context(cafile=str(ca))
        limits = httpx.Limits(max_connections=256)
        self.inner = httpx.AsyncClient(
            base_url=f"https://{address}", verify=trusted, timeout=120.0, limits=limits, trust_env=False
        )

    async def __call__(self, scope: Scope, receive: Call, send: Say) -> None:
        if scope["type"] != "http":  # the server's own start and end; no web sockets
            return
        if scope["method"] != "POST" or not OPEN.fullmatch(scope["path"]):
            await _say(send, 404, [], b"")
            return
        body = bytearray()
        while True:
            piece = await receive()
            if piece["type"] == "http.disconnect":
                return
            body += piece.get("body", b"")
            if len(body) > LIMIT:
                await _say(send, 413, [], b"")
                return
            if not piece.get("more_body"):
                break
        headers = [*_carried(scope["headers"]), (b"accept-encoding", b"identity")]
        try:
            answer = await self.inner.post(scope["path"], content=bytes(body), headers=headers)
        except httpx.HTTPError:
            await _say(send, 503, [], b"")
            return
        await _say(send, answer.status_code, _carried(answer.headers.raw), answer.content)


def _carried(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in HERE]


async def _say(send: Say, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    kit, inner = Path(sys.argv[1]), int(sys.argv[2])
    host, _, port = kits.about(kit, "server")["server"].rpartition(":")
    startup = kit / "startup"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    uvicorn.run(
        Gate(f"127.0.0.1:{inner}", startup / "ca.crt"),
        host="127.0.0.1" if host in LOCAL else "0.0.0.0",
        port=int(port),
        ssl_certfile=str(startup / "server.crt"),
        ssl_keyfile=str(startup / "server.key"),
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
