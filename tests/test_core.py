"""What may run next to private data: module-level functions marked `in_silo`, and nothing else."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from fedtailor import wire
from fedtailor.core import Method, Reply, Silo, Total, in_silo
from fedtailor.engines.in_process import InProcess
from fedtailor.wire import WireError

wire.allow(__name__)


@dataclass(frozen=True)
class Number:
    n: float


@in_silo
def double(silo: Silo, body: Number) -> Number:
    return Number(2 * body.n)


def double_many(silos: list[Silo], body: Number) -> list[Number]:
    return [Number(2 * body.n) for _ in silos]


@in_silo(cohort=double_many, memory=False)
def double_together(silo: Silo, body: Number) -> Number:
    return Number(2 * body.n)


def unmarked(silo: Silo, body: Number) -> Number:
    return body


class Holder:
    @staticmethod
    def static(silo: Silo, body: Number) -> Number:
        return body

    def method(self, silo: Silo, body: Number) -> Number:
        return body


marked_lambda = in_silo(lambda silo, body: body)


def test_the_mark_says_how_the_work_is_done() -> None:
    assert (double.__in_silo__, double.__cohort__, double.__memory__) == (True, None, True)
    assert (double_together.__in_silo__, double_together.__cohort__, double_together.__memory__) == (
        True,
        double_many,
        False,
    )


def test_marked_work_is_still_an_ordinary_function() -> None:
    assert double(Silo("a", None, {}, 0), Number(1.5)) == Number(3.0)


def test_a_closure_cannot_be_marked() -> None:
    secret = 3.0

    def leak(silo: Silo, body: Number) -> Number:
        return Number(secret)

    with pytest.raises(TypeError, match="leak must be a module-level function"):
        in_silo(leak)
    with pytest.raises(TypeError, match="leak must be a module-level function"):
        in_silo(cohort=double_many)(leak)


@pytest.mark.parametrize("function", [Holder.static, Holder().method, Holder.method])
def test_a_method_cannot_be_marked(function: Any) -> None:
    with pytest.raises(TypeError, match="must be a module-level function"):
        in_silo(function)


def asked(work: Any) -> list[Any]:
    return list(InProcess({"a": None, "b": None}, {}).reach(1)(work, Number(2.0)))


def test_an_ask_sends_marked_work() -> None:
    assert asked(double) == [Reply("a", Number(4.0)), Reply("b", Number(4.0))]


@pytest.mark.parametrize("work", [unmarked, Holder.static, Holder().method, marked_lambda, lambda s, b: b, print, len])
def test_an_ask_refuses_any_other_work(work: Any) -> None:
    with pytest.raises(WireError):
        asked(work)


def test_an_ask_refuses_a_closure_before_any_silo_is_asked() -> None:
    def leak(silo: Silo, body: Number) -> Number:
        return body

    engine = InProcess({"a": None}, {})
    with pytest.raises(WireError):
        engine.reach(1)(leak, Number(1.0))  # not even the iterator is handed out
    assert engine.traffic.take() == (0, 0)


def test_replies_and_totals_cannot_be_changed_on_the_way() -> None:
    with pytest.raises(FrozenInstanceError):
        Reply("a", Number(1.0)).silo = "b"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Total(Number(1.0), 1.0, ("a",)).weight = 2.0  # type: ignore[misc]


def test_silos_share_no_memory_by_default() -> None:
    one, other = Silo("a", None, {}, 0), Silo("b", None, {}, 0)
    one.memory["n"] = 1
    assert other.memory == {}


def test_a_method_pooled_is_itself_unless_it_says_otherwise() -> None:
    class Asking(Method[int]):
        def round(self, state: int, ask: Any) -> int:
            return state + 1

    method = Asking()
    assert method.pooled(7) is method
