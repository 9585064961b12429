"""One question at a time, over real connections: who waits is told, who leaves is not answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from browser import PATIENCE
from fedtailor.retrieval.answered import Answered
from fedtailor.retrieval.turns import Turns
from test_page import Answers, asking, serving, told


def test_others_wait_their_turn_in_one_thread_and_are_told() -> None:
    go = threading.Event()

    def script(question: str) -> Iterator[Answered]:
        yield Answered(question, asked=("north",))
        assert go.wait(PATIENCE)
        yield Answered(question, question, done=True)

    answers = Answers(script)
    with serving(answers) as address, asking(address, "first") as first:
        assert [next(first), next(first)] == [{"question": "first"}, {"asked": ["north"]}]
        with asking(address, "second") as second, asking(address, "third") as third:
            assert [next(second), next(second)] == [{"question": "second"}, {"ahead": 1}]
            assert [next(third), next(third)] == [{"question": "third"}, {"ahead": 2}]
            assert answers.asked == ["first"]
            go.set()
            assert list(second)[-1]["more"] == "second"
            rest = list(third)
            assert rest[0] == {"ahead": 1}
            assert rest[-1]["more"] == "third"
        assert next(first)["more"] == "first"
    assert answers.asked == ["first", "second", "third"]
    assert answers.ends == ["whole"] * 3
    assert len(answers.threads) == 1


def test_a_line_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtailor.retrieval.turns.LONGEST", 1)
    go = threading.Event()

    def script(question: str) -> Iterator[Answered]:
        yield Answered(question, "a")
        assert go.wait(PATIENCE)

    with serving(Answers(script)) as address, asking(address, "first") as first:
        assert [next(first), next(first)][1] == {"more": "a"}
        assert told(address)[-1] == {"error": "too many questions are waiting; ask again later"}
        go.set()


def test_who_leaves_stops_the_writing_and_is_not_asked_for_where_it_waited() -> None:
    more = threading.Semaphore(0)

    def script(question: str) -> Iterator[Answered]:
        for count in range(1, 200):
            assert more.acquire(timeout=PATIENCE)
            yield Answered(question, "a" * count)
        yield Answered(question, "b", done=True)

    answers = Answers(script)
    with serving(answers) as address:
        with asking(address, "first") as first:
            more.release()
            assert [next(first), next(first)][1] == {"more": "a"}
            with asking(address, "in line") as line:
                assert [next(line), next(line)][1] == {"ahead": 1}
        while not answers.ended.wait(0.05):  # it is told at what it yields next, once the server knows
            more.release()
        assert answers.ends == ["stopped"]
        more.release(200)
        assert told(address, "last")[-1]["done"] is True
    assert answers.asked == ["first", "last"]
    assert answers.ends == ["stopped", "whole"]


def test_a_reader_that_is_slow_is_given_the_latest() -> None:
    go = threading.Event()

    def script(question: str) -> Iterator[Answered]:
        yield Answered(question, "a")
        assert go.wait(PATIENCE)
        for count in range(2, 10):
            yield Answered(question, "a" * count, done=count == 9)

    async def read(answers: Answers) -> list[int | Answered]:
        pieces = Turns(answers).ask("q")
        got = [await anext(pieces)]
        go.set()
        assert await asyncio.to_thread(answers.ended.wait, PATIENCE), "it does not wait for its reader"
        return got + [piece async for piece in pieces]

    assert asyncio.run(read(Answers(script))) == [Answered("q", "a"), Answered("q", "a" * 9, done=True)]
