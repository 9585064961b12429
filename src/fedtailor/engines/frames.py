"""Messages over a stream socket: a small JSON head, then a body of bytes.

    4 bytes head length, 8 bytes body length (big-endian), the head, the body

Both lengths are checked against a limit before any memory is spent on what they announce.
"""

from __future__ import annotations

import io
import json
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fedtailor.errors import FedtailorError
from fedtailor.packed import LARGE, Packed, Spooled, nameless

HEAD_LIMIT = 64 * 1024
BODY_LIMIT = 4 * 1024**3  # bytes; a silo may set less
PIECE = 1 << 20  # bytes read or written at once
_LENGTHS = struct.Struct(">IQ")


class FrameError(FedtailorError):
    """What came is no message of ours: too large, cut off, or not JSON."""


class Closed(FrameError):
    """The other side went away between two messages, or in the middle of one."""


def send(link: socket.socket, head: Mapping[str, Any], body: Packed | BinaryIO = b"") -> None:
    """A body in a file is sent from its start, piece by piece: it never lies in memory as a whole."""
    text = json.dumps(head, separators=(",", ":")).encode()
    if isinstance(body, bytes):
        link.sendall(_LENGTHS.pack(len(text), len(body)) + text)
        if body:
            link.sendall(body)
        return
    file = (body.file if isinstance(body, Spooled) else body).fileno()
    size = os.fstat(file).st_size
    link.sendall(_LENGTHS.pack(len(text), size) + text)
    for offset in range(0, size, PIECE):  # by offset: several threads may send the same file
        link.sendall(os.pread(file, PIECE, offset))


def receive(link: socket.socket, limit: int = BODY_LIMIT, spool: Path | None = None) -> tuple[dict[str, Any], Packed]:
    """The next message; a large body goes to a file without a name in `spool`, if there is one. Raises Closed at its end,
    FrameError for what must not be read on."""
    head, size = _head(link, limit)
    if spool is None or size < LARGE:
        return head, _exactly(link, size)
    file = nameless(spool)
    _into(link, file, size)
    return head, Spooled(file)


def receive_into(link: socket.socket, file: BinaryIO, limit: int = BODY_LIMIT) -> tuple[dict[str, Any], int]:
    """As `receive`, but the body goes to a file as it comes. Returns its size."""
    head, size = _head(link, limit)
    _into(link, file, size)
    return head, size


def _into(link: socket.socket, file: BinaryIO, left: int) -> None:
    while left:
        piece = _exactly(link, min(PIECE, left))
        file.write(piece)
        left -= len(piece)


def _head(link: socket.socket, limit: int) -> tuple[dict[str, Any], int]:
    head_size, body_size = _LENGTHS.unpack(_exactly(link, _LENGTHS.size))
    if head_size > HEAD_LIMIT or body_size > limit:
        raise FrameError(f"a message of {head_size} + {body_size} bytes was announced; the limits are {HEAD_LIMIT} + {limit}")
    try:
        head = json.loads(_exactly(link, head_size))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a message's head is not JSON: {error}") from error
    if not isinstance(head, dict):
        raise FrameError("a message's head is no JSON object")
    return head, body_size


def _exactly(link: socket.socket, count: int) -> bytes:
    """`count` bytes, however many, without a second copy: a buffered reader reads large ones in place."""
    try:
        whole = io.BufferedReader(_Rest(link, count)).read(count)
    except ConnectionError as error:
        raise Closed(f"the connection broke: {error}") from error
    if len(whole) < count:
        raise Closed("the other side closed the connection" + (f" after {len(whole)} of {count} bytes" if whole else ""))
    return whole


class _Rest(io.RawIOBase):
    """The next `count` bytes of a link as a file: a reader must not read on into the next message."""

    def __init__(self, link: socket.socket, count: int) -> None:
        self.link, self.left = link, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self.link.recv_into(buffer, min(self.left, len(buffer), PIECE)) if self.left else 0
        self.left -= got
        return got
