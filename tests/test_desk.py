"""A silo's side: a request is applied once, whatever is repeated, changed, forgotten or fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.core import Silo, in_silo
from fedtailor.engines.desk import Desk, Request, answer, seed_of
from fedtailor.errors import SiloError
from fedtailor.limits import TOLD
from fedtailor.wire import Failure, WireError

wire.allow(__name__)


@dataclass(frozen=True)
class Add:
    amount: int
    refusing: tuple[str, ...] = ()  # these silos add, and then fail
    failing: tuple[str, ...] = ()  # the cohort gives a Failure for these, without raising


@dataclass(frozen=True)
class Sum:
    total: int
    seed: int = 0
    together: int = 1


def add_many(silos: Sequence[Silo], body: Add) -> list[Any]:
    done: list[Any] = []
    for silo in silos:
        silo.memory["n"] = silo.memory.get("n", 0) + body.amount
        silo.memory.setdefault("t", torch.zeros(1)).add_(body.amount)  # in place: a copy must have been handed in
        if silo.name in body.refusing:
            raise SiloError(f"{silo.name} refuses")
        failed = silo.name in body.failing
        done.append(Failure("no") if failed else Sum(silo.memory["n"], silo.seed, len(silos)))
    return done


@in_silo(cohort=add_many)
def add(silo: Silo, body: Add) -> Any:
    return add_many([silo], body)[0]


@in_silo(memory=False)
def add_without_memory(silo: Silo, body: Add) -> Any:
    return add_many([silo], body)[0]


@in_silo
def broken(silo: Silo, body: Add) -> Sum:
    silo.memory["n"] = -1
    raise ZeroDivisionError("a bug")


def desk(name: str = "a", **memory: Any) -> Desk:
    return Desk(name, None, {}, seed=7, memory=memory)


def request(amount: int, index: int = 0, number: int = 1, work: Any = add, **more: Any) -> Request:
    return Request("run", number, index, wire.address(work), wire.pack(Add(amount, **more)))


def told(desks: Desk | list[Desk], asked: Request) -> list[Any]:
    return [wire.unpack(reply) for reply in answer(desks if isinstance(desks, list) else [desks], asked)]


def totals(desks: Desk | list[Desk], asked: Request) -> list[int]:
    return [reply.total for reply in told(desks, asked)]


def kept(one: Desk) -> tuple[int, float]:
    return one.memory.get("n", 0), one.memory.get("t", torch.zeros(1)).item()


def test_a_repeated_request_gets_the_recorded_reply_and_is_applied_once() -> None:
    one = desk()
    first = answer([one], request(5))
    assert answer([one], request(5)) == first
    assert answer([one], request(5)) == first
    assert one.commit(one.round)
    assert kept(one) == (5, 5.0)


def test_an_earlier_request_repeated_after_a_later_one_changes_nothing() -> None:
    one = desk()
    assert totals(one, request(1)) == [1]
    assert totals(one, request(10, index=1)) == [11]
    assert totals(one, request(1)) == [1]
    one.commit(one.round)
    assert kept(one) == (11, 11.0)


def test_a_changed_request_restarts_from_the_memory_before_it() -> None:
    one = desk(n=100, t=torch.tensor([100.0]))
    assert totals(one, request(1)) == [101]
    assert totals(one, request(10, index=1)) == [111]
    assert totals(one, request(2)) == [102], "the same place, another body"
    one.commit(one.round)
    assert kept(one) == (102, 102.0), "what came after the changed request did not happen"


def test_the_same_body_for_other_work_is_another_request() -> None:
    one = desk()
    assert totals(one, request(1)) == [1]
    assert totals(one, request(1, work=add_without_memory)) == [1]
    one.commit(one.round)
    assert kept(one) == (0, 0.0), "the work without memory took the place of the one that remembered"


def test_a_round_that_was_not_committed_is_forgotten() -> None:
    one = desk()
    totals(one, request(5, number=1))
    assert totals(one, request(1, number=2)) == [1]
    one.commit(one.round)
    assert kept(one) == (1, 1.0)


def test_a_round_begun_anew_starts_from_the_last_commit() -> None:
    """A server that was killed comes back with the last generation and asks the round again, perhaps otherwise."""
    one = desk()
    totals(one, request(5, number=1))
    one.commit(one.round)
    totals(one, request(7, number=2))
    again = Desk("a", None, {}, seed=7, memory=one.memory)
    assert totals(again, request(8, number=2)) == [13]


def test_a_silo_that_was_not_asked_before_keeps_its_place() -> None:
    one = desk()
    assert totals(one, request(3, index=2)) == [3]
    assert totals(one, request(4, index=3)) == [7]
    assert totals(one, request(3, index=2)) == [3]
    one.commit(one.round)
    assert kept(one) == (7, 7.0)


def test_memory_is_final_only_at_the_commit_and_handed_out_as_a_copy() -> None:
    one = desk(n=1, t=torch.ones(1))
    totals(one, request(2))
    assert kept(one) == (1, 1.0)
    one.commit(one.round)
    assert kept(one) == (3, 3.0)


def test_work_without_memory_sees_none_and_leaves_none() -> None:
    one = desk(n=100)
    assert totals(one, request(1, work=add_without_memory)) == [1]
    assert not one.commit(one.round), "nothing to write"
    assert one.memory == {"n": 100}


def test_a_failure_leaves_memory_as_it_was() -> None:
    one = desk(n=1)
    totals(one, request(2))
    assert told(one, request(10, index=1, refusing=("a",))) == [Failure("a refuses")]
    assert totals(one, request(4, index=2)) == [7]
    one.commit(one.round)
    assert one.memory["n"] == 7


def test_a_failure_is_recorded_like_any_reply() -> None:
    one = desk()
    first = answer([one], request(1, refusing=("a",)))
    assert answer([one], request(1, refusing=("a",))) == first
    assert not one.commit(one.round)


def test_a_bug_is_raised_and_nothing_is_recorded() -> None:
    one = desk(n=1)
    with pytest.raises(ZeroDivisionError):
        answer([one], request(1, work=broken))
    assert one.recorded(request(1, work=broken)) is None
    assert not one.commit(one.round)
    assert one.memory == {"n": 1}


def test_what_is_not_in_silo_is_refused_and_nothing_is_recorded() -> None:
    one = desk()
    bad = Request("run", 1, 0, f"{__name__}:add_many", wire.pack(Add(1)))
    with pytest.raises(WireError, match="not an in_silo function"):
        answer([one], bad)
    assert one.recorded(bad) is None


def test_replies_come_in_the_order_of_the_desks() -> None:
    many = [desk("c", n=30), desk("a", n=10), desk("b", n=20)]
    assert totals(many, request(1)) == [31, 11, 21]
    assert [reply.together for reply in told(many, request(1, index=1))] == [3, 3, 3]


def test_only_those_who_have_not_answered_are_asked() -> None:
    many = [desk("a"), desk("b"), desk("c")]
    before = told(many[1], request(5))
    after = told(many, request(5))
    assert [reply.total for reply in after] == [5, 5, 5]
    assert after[1] == before[0]
    assert [reply.together for reply in after] == [2, 1, 2]
    for one in many:
        one.commit(one.round)
    assert [kept(one) for one in many] == [(5, 5.0)] * 3


def test_a_cohort_in_which_one_cannot_loses_only_that_one() -> None:
    many = [desk(name, n=100) for name in "abc"]
    found = told(many, request(5, refusing=("b",)))
    assert found[1] == Failure("b refuses")
    assert [found[0].total, found[2].total] == [105, 105]
    for one in many:
        one.commit(one.round)
    assert [one.memory["n"] for one in many] == [105, 100, 105], "the cut-off pass must not count beside the second"


def test_a_cohort_that_names_one_failure_loses_only_that_one() -> None:
    many = [desk(name, n=100) for name in "abc"]
    found = told(many, request(5, failing=("c",)))
    assert [found[0].total, found[1].total, found[2]] == [105, 105, Failure("no")]
    assert [one.commit(one.round) for one in many] == [True, True, False]
    assert [one.memory["n"] for one in many] == [105, 105, 100]


def test_seeds_differ_by_silo_round_and_ask_and_by_nothing_else() -> None:
    def seed(name: str, number: int, index: int) -> int:
        one = Desk(name, None, {}, seed=7)
        return told(one, request(1, index, number))[0].seed

    places = [(name, number, index) for name in ("a", "b") for number in (1, 2, 11) for index in (0, 1)]
    seeds = [seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [seed(*place) for place in places]
    assert all(0 <= s < 2**56 for s in seeds)


def test_places_that_read_alike_have_seeds_of_their_own() -> None:
    assert seed_of(1, 1, 11) != seed_of(1, 11, 1)
    assert seed_of(0, "a") != seed_of(1, "a")
    assert seed_of(0, "a") == seed_of(0, "a")


def test_a_request_is_known_by_all_that_it_is() -> None:
    def made(run: str = "run", number: int = 1, index: int = 0, work: str = "m:w", body: bytes = b"x") -> str:
        return Request(run, number, index, work, body).id("a")

    ids = [made(), made("other"), made(number=2), made(index=1), made(work="m:v"), made(body=b"y")]
    assert len({*ids, Request("run", 1, 0, "m:w", b"x").id("b")}) == 7
    assert made() == ids[0]


steps = st.tuples(
    st.sampled_from(("ask", "ask", "ask", "commit", "ask in a new round")), st.integers(0, 3), st.integers(1, 3)
)


@given(st.lists(steps, max_size=25))
@settings(max_examples=150, deadline=None)
def test_any_course_of_a_run_equals_the_sum_of_what_counts(course: list[tuple[str, int, int]]) -> None:
    """The reference: what is committed, and a list of the open round's amounts, cut where a request changed."""
    one, number = desk(), 1
    committed = 0
    opened: list[int] = []
    for what, index, amount in course:
        if what == "commit":
            one.commit(one.round)
            committed += sum(opened)
        if what != "ask":  # a round that was not committed did not happen
            number, opened = number + 1, []
        if what != "commit":
            if not (index < len(opened) and opened[index] == amount):
                opened[index:] = []
                opened += [0] * (index - len(opened)) + [amount]
            assert totals(one, request(amount, index, number)) == [committed + sum(opened[: index + 1])]
        assert one.memory.get("n", 0) == committed


def test_a_commit_of_another_round_forgets_what_an_abandoned_one_left() -> None:
    one = desk(n=1)
    answer([one], request(5, number=1))  # round 1 is abandoned: the silo is not in its repetition
    assert not one.commit(2)
    assert one.memory == {"n": 1}


@in_silo
def tell(silo: Silo, body: Add) -> Sum:
    """Adds to what is told for good, and to what is not."""
    told = silo.memory.get(TOLD, {"n": 0})["n"] + body.amount
    silo.memory[TOLD] = {"n": told}
    silo.memory["n"] = silo.memory.get("n", 0) + body.amount
    if silo.name in body.refusing:
        raise SiloError("no more")
    return Sum(told, silo.memory["n"])


def test_what_was_told_stays_told_whatever_is_taken_back() -> None:
    def asked(amount: int, **more: Any) -> tuple[int, int]:
        (reply,) = told(one, request(amount, work=tell, **more))
        return reply.total, reply.seed

    one = desk()
    assert asked(1) == (1, 1)
    assert asked(1) == (1, 1), "the same request again costs nothing"
    assert asked(2) == (3, 2), "another body at the same place: the rest is as before it"
    assert asked(4, number=2) == (7, 4), "round 1 was never committed"
    assert one.memory == {TOLD: {"n": 7}}, "at once, without a commit"
    assert told(one, request(8, 1, 2, tell, refusing=("a",))) == [Failure("no more")]
    assert asked(16, index=1, number=2) == (23, 20), "what it refused to tell costs nothing"
    one.commit(2)
    assert one.memory == {TOLD: {"n": 23}, "n": 20}
