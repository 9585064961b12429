"""What a server program holds of a kit: free again where it could not have all of it, and deaf to who does not concern it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtailor.engines import courier, frames
from fedtailor.engines import kit as kits
from fedtailor.engines.courier import Link
from fedtailor.engines.program import Program
from fedtailor.errors import UserError


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    one = Program(tmp_path)
    yield one
    one.close()


def ends() -> tuple[Link, socket.socket]:
    mine, theirs = socket.socketpair()
    return Link(fileno=mine.detach()), theirs


def test_one_at_a_time_and_free_where_the_socket_fails(tmp_path: Path) -> None:
    (tmp_path / kits.SOCKET).mkdir()  # nothing can listen there
    with pytest.raises(OSError, match=r"courier\.sock"):
        Program(tmp_path)
    (tmp_path / kits.SOCKET).rmdir()
    one = Program(tmp_path)
    with pytest.raises(UserError, match="another program runs over this federation"):
        Program(tmp_path)
    one.close()
    assert not (tmp_path / kits.SOCKET).exists()
    Program(tmp_path).close()


def test_only_the_job_that_is_waited_for_is_heard(program: Program) -> None:
    assert program.called("mine", 0.0) is None
    with courier.connect(program.kit / kits.SOCKET, 5) as stranger:
        frames.send(stranger, {"kind": "job", "job": "another"})
        assert program.called("mine", 5.0) is None
        assert stranger.ended(), "it is told by hanging up"
    with courier.connect(program.kit / kits.SOCKET, 5) as job:
        frames.send(job, {"kind": "job", "job": "mine", "silos": ["a"]})
        called = program.called("mine", 5.0)
        assert called is not None
        assert called[1]["silos"] == ["a"]
        called[0].close()


def test_answers_to_this_exchange_alone_and_who_went_away(program: Program) -> None:
    link, end = ends()
    with link, end:
        asked: list[dict[str, object]] = []

        def answer() -> None:
            head, body = frames.receive(end)
            asked.append(head)
            for number, silo in (("0", "a"), (head["id"], "c"), (head["id"], "a")):
                frames.send(end, {"kind": "answer", "id": number, "silo": silo, "head": {"said": number}}, body)

        threading.Thread(target=answer, daemon=True).start()
        waiting = ["a", "b"]
        gone = lambda left: [silo for silo in left if silo == "b" and "a" not in left]  # noqa: E731
        found = list(program.exchange(link, waiting, {"kind": "hello"}, b"x", time.monotonic() + 20, gone))
    assert [(one.silo, one.lost, one.body) for one in found] == [("a", "", b"x"), ("b", "its site went away", b"")]
    assert found[0].head == {"said": asked[0]["id"]}
    assert waiting == []


def test_an_end_that_hangs_up_is_lost(program: Program) -> None:
    link, end = ends()
    with link:
        end.close()
        with pytest.raises((OSError, frames.FrameError)):
            list(program.exchange(link, ["a"], {"kind": "hello"}, b"x" * 10**6, time.monotonic() + 5))
