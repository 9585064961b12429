"""Messages over a socket: whole, or a named error before memory is spent."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtailor.engines import frames
from fedtailor.packed import LARGE, Spooled, digest, nameless


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    one.settimeout(5)
    other.settimeout(5)
    with one, other:
        yield one, other


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    head=st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.text())), body=st.binary(max_size=99)
)
def test_what_is_sent_arrives(ends: tuple[socket.socket, socket.socket], head: dict[str, object], body: bytes) -> None:
    frames.send(ends[0], head, body)
    frames.send(ends[0], {"next": 1})
    assert frames.receive(ends[1]) == (head, body)
    assert frames.receive(ends[1]) == ({"next": 1}, b"")


@pytest.mark.parametrize(("head", "body"), [(frames.HEAD_LIMIT + 1, 0), (2, 10 * 1024**3), (2, 101)])
def test_what_is_too_large_is_refused_by_its_announcement(
    ends: tuple[socket.socket, socket.socket], head: int, body: int
) -> None:
    ends[0].sendall(struct.pack(">IQ", head, body))  # and nothing after it: it must not be waited for
    with pytest.raises(frames.FrameError, match=rf"a message of {head} \+ {body} bytes was announced; the limits are"):
        frames.receive(ends[1], limit=100)


def test_half_a_message_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(struct.pack(">IQ", 2, 10) + b"{}" + b"half")
    ends[0].close()
    with pytest.raises(frames.Closed, match="closed the connection after 4 of 10 bytes"):
        frames.receive(ends[1])


@pytest.mark.parametrize("text", [b"not json", b"[1]", b"\xff", b"[" * 30000])
def test_a_head_that_is_none(ends: tuple[socket.socket, socket.socket], text: bytes) -> None:
    ends[0].sendall(struct.pack(">IQ", len(text), 0) + text)
    with pytest.raises(frames.FrameError, match="a message's head is no"):
        frames.receive(ends[1])


@pytest.mark.parametrize("size", [0, 1, frames.PIECE, frames.PIECE + 1, 5_000_000])
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("to_file", [False, True])
def test_bodies_come_whole_also_by_way_of_files(
    ends: tuple[socket.socket, socket.socket], size: int, from_file: bool, to_file: bool, tmp_path: Path
) -> None:
    body = os.urandom(size)
    (tmp_path / "body").write_bytes(body)

    def send() -> None:
        frames.send(ends[0], {"kind": "ask"}, Spooled((tmp_path / "body").open("rb")) if from_file else body)
        frames.send(ends[0], {"kind": "next"}, b"n")

    sending = threading.Thread(target=send)
    sending.start()
    if to_file:
        file = io.BytesIO()
        assert frames.receive_into(ends[1], file) == ({"kind": "ask"}, size)
        assert file.getvalue() == body
    else:
        assert frames.receive(ends[1]) == ({"kind": "ask"}, body)
    assert frames.receive(ends[1]) == ({"kind": "next"}, b"n")  # nothing of it was read before
    sending.join()


def test_a_file_is_sent_from_its_start(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    file = nameless(tmp_path / "spool")
    file.write(b"abc")
    frames.send(ends[0], {}, file)
    assert frames.receive(ends[1]) == ({}, b"abc")


def test_a_large_body_comes_into_a_file_without_a_name(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    body = os.urandom(LARGE)
    sending = threading.Thread(target=frames.send, args=(ends[0], {}, body))
    sending.start()
    _, came = frames.receive(ends[1], spool=tmp_path / "spool")
    sending.join()
    assert isinstance(came, Spooled)
    assert len(came) == LARGE
    assert digest(came) == digest(body)
    assert list((tmp_path / "spool").iterdir()) == []


def test_half_a_message_is_told_also_on_the_way_to_a_file(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(struct.pack(">IQ", 2, 10) + b"{}" + b"half")
    ends[0].close()
    with pytest.raises(frames.Closed, match="after 4 of 10 bytes"):
        frames.receive_into(ends[1], io.BytesIO())
