"""Messages over a stream socket: a small JSON head, then a body of bytes.

    4 bytes head length, 8 bytes body length (big-endian), the head, the body

Both lengths are checked against a limit before any memory is spent on what they announce.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from fedtailor.errors import FedtailorError

HEAD_LIMIT = 64 * 1024
BODY_LIMIT = 4 * 1024**3  # bytes; a silo may set less
_LENGTHS = struct.Struct(">IQ")


class FrameError(FedtailorError):
    """What came is no message of ours: too large, cut off, or not JSON."""


class Closed(FrameError):
    """The other side went away between two messages, or in the middle of one."""


def send(link: socket.socket, head: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
    text = json.dumps(head, separators=(",", ":")).encode()
    link.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    if len(body):
        link.sendall(body)


def receive(link: socket.socket, limit: int = BODY_LIMIT) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises Closed at its end, FrameError for what must not be read on."""
    head_size, body_size = _LENGTHS.unpack(_exactly(link, _LENGTHS.size))
    if head_size > HEAD_LIMIT or body_size > limit:
        raise FrameError(f"a message of {head_size} + {body_size} bytes was announced; the limits are {HEAD_LIMIT} + {limit}")
    try:
        head = json.loads(_exactly(link, head_size))
    except ValueError as error:
        raise FrameError(f"a message's head is not JSON: {error}") from error
    if not isinstance(head, dict):
        raise FrameError("a message's head is no JSON object")
    return head, bytes(_exactly(link, body_size))


def _exactly(link: socket.socket, count: int) -> bytearray:
    """`count` bytes, in place: one buffer, however large."""
    whole = bytearray(count)
    view = memoryview(whole)
    got = 0
    while got < count:
        try:
            more = link.recv_into(view[got:], min(count - got, 1 << 20))
        except ConnectionError as error:
            raise Closed(f"the connection broke: {error}") from error
        if more == 0:
            raise Closed("the other side closed the connection" + (f" after {got} of {count} bytes" if got else ""))
        got += more
    return whole
