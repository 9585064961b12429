"""The simulated federation: everything crosses the wire, is counted, checked at the server, and summed in silo order."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.core import Silo, in_silo
from fedtailor.data import Data, Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, SiloError
from fedtailor.evaluate import Evaluation
from fedtailor.experiment import Experiment, run
from fedtailor.faults import Faults
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident

wire.allow(__name__)

SEEN: list[tuple[str, ...]] = []  # which silos were in one pass; the work's bodies cannot tell of the pass itself


@dataclass(frozen=True)
class Down:
    tensors: dict[str, torch.Tensor]
    refusing: tuple[str, ...] = ()
    size: int = 0  # of the tensor that comes back, when not as asked


@dataclass(frozen=True)
class Up:
    tensors: dict[str, torch.Tensor]
    weight: float
    loss: float = 0.0

    def problem(self, asked: Down) -> str | None:
        if self.loss < 0:
            return "the loss is negative"
        return wire.not_finite(self)


@dataclass(frozen=True)
class Unchecked:
    """A body without a `problem` of its own."""

    value: torch.Tensor


def work_many(silos: Sequence[Silo], body: Down) -> list[Up]:
    SEEN.append(tuple(silo.name for silo in silos))
    ups = []
    for silo in silos:
        if silo.name in body.refusing:
            raise SiloError(f"{silo.name} has no rows")
        silo.memory["asked"] = silo.memory.get("asked", 0) + 1
        ups.append(Up({n: t * silo.data for n, t in body.tensors.items()}, float(silo.data), silo.data / 10))
    return ups


@in_silo
def work(silo: Silo, body: Down) -> Up:
    return work_many([silo], body)[0]


@in_silo(cohort=work_many)
def work_together(silo: Silo, body: Down) -> Up:
    return work_many([silo], body)[0]


@in_silo
def spoil(silo: Silo, body: Down) -> Unchecked:
    """Changes what it was sent, and sends it back."""
    body.tensors["w"].fill_(99.0)
    return Unchecked(body.tensors["w"])


@in_silo
def not_finite(silo: Silo, body: Down) -> Unchecked:
    return Unchecked(torch.tensor([1.0, math.nan if silo.name == "b" else 1.0]))


@in_silo
def slow(silo: Silo, body: Down) -> Up:
    time.sleep(silo.data)
    return Up({}, 1.0)


@in_silo(memory=False)
def large(silo: Silo, body: Down) -> Up:
    return Up({"w": torch.ones(body.size)}, 1.0)


def probe(body: Down) -> Down | None:
    return replace(body, size=1) if "w" in body.tensors else None


def quick_many(silos: Sequence[Silo], body: Down) -> list[Up]:
    """A pass takes the same time for any number of silos up to four, and four times it for more."""
    SEEN.append(tuple(silo.name for silo in silos))
    time.sleep(0.02 if len(silos) <= 4 else 0.3)
    return [Up({}, 1.0, float(body.size)) for _ in silos]


quick_many.probe = probe  # type: ignore[attr-defined]


@in_silo(cohort=quick_many)
def quick(silo: Silo, body: Down) -> Up:
    return quick_many([silo], body)[0]


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


ASKED = Down({"w": torch.tensor([1.0, -2.0])})
THREE = {"a": 1, "b": 2, "c": 5}


def engine(data: Any = None, **more: Any) -> InProcess:
    return InProcess(THREE if data is None else data, {}, **more)


def ask(one: InProcess, what: Any = work, body: Down = ASKED, **more: Any) -> list[Any]:
    return list(one.reach(1)(what, body, **more))


def test_replies_come_in_silo_order_with_what_each_silo_made() -> None:
    found = ask(engine({"c": 5, "a": 1, "b": 2}))
    assert [reply.silo for reply in found] == ["c", "a", "b"]
    assert [reply.body.tensors["w"].tolist() for reply in found] == [[5.0, -10.0], [1.0, -2.0], [2.0, -4.0]]


def test_an_ask_reaches_the_sample_unless_it_says_whom() -> None:
    reach = engine().reach(1, ["a", "c"])
    assert [reply.silo for reply in reach(work, ASKED)] == ["a", "c"]
    assert [reply.silo for reply in reach(work, ASKED, to=["b"])] == ["b"]
    assert list(reach(work, ASKED, to=[])) == []


def test_bytes_counted_are_the_bytes_of_every_message() -> None:
    messages: list[tuple[str, str, bytes]] = []
    one = engine(record=lambda *message: messages.append(message))
    found = ask(one) + ask(one, to=["b"])
    assert [m[:2] for m in messages[:6]] == [(silo, way) for silo in "abc" for way in ("down", "up")]
    assert [m[2] for m in messages if m[1] == "up"] == [wire.pack(reply.body) for reply in found]
    assert all(m[2] == wire.pack(ASKED) for m in messages if m[1] == "down")
    up, down = (sum(len(m[2]) for m in messages if m[1] == way) for way in ("up", "down"))
    assert one.traffic.take() == (up, down)
    assert one.traffic.take() == (0, 0)


def test_a_total_is_the_weighted_sum_by_hand() -> None:
    total = engine().reach(1).total(work, ASKED)
    # weights 1, 2, 5; tensors weight * (1, -2): 1 + 4 + 25 = 30; loss weight / 10, so .1 + .4 + 2.5
    assert total.sum.tensors["w"].tolist() == [30.0, -60.0]
    assert total.sum.loss == pytest.approx(3.0)
    assert (total.weight, total.sum.weight, total.silos) == (8.0, 8.0, ("a", "b", "c"))


def test_a_total_of_some_leaves_out_the_others_and_the_rejected() -> None:
    one = engine(faults=Faults(attackers=("c",), attack="nan"))
    total = one.reach(1).total(work, ASKED, to=["b", "c"])
    assert (total.sum.tensors["w"].tolist(), total.weight, total.silos) == ([4.0, -8.0], 2.0, ("b",))
    assert one.rejected == [(1, "c", "tensors/w")]


def test_nothing_is_aliased() -> None:
    sent = Down({"w": torch.zeros(2)})
    found = ask(engine(), spoil, sent)
    assert sent.tensors["w"].tolist() == [0.0, 0.0]
    found[0].body.value.zero_()
    assert found[1].body.value.tolist() == [99.0, 99.0]


def test_rejected_replies_are_named_counted_and_left_out() -> None:
    one = engine({"a": 1, "b": -2, "c": 5})
    assert [reply.silo for reply in ask(one)] == ["a", "c"]
    assert [reply.silo for reply in ask(one, body=replace(ASKED, refusing=("c",)))] == ["a"]
    assert one.rejected == [
        (1, "b", "the loss is negative"),
        (1, "b", "the loss is negative"),
        (1, "c", "c has no rows"),
    ]


def test_a_body_without_a_check_must_be_finite() -> None:
    one = engine()
    assert [reply.silo for reply in ask(one, not_finite)] == ["a", "c"]
    assert one.rejected == [(1, "b", "value")]


def test_a_round_without_any_usable_reply_ends_the_run_with_the_reasons() -> None:
    one = engine({"a": 1, "b": -2})
    with pytest.raises(RunError, match="no reply of 2 silos could be used; a: a has no rows; b: the loss is negative"):
        ask(one, body=replace(ASKED, refusing=("a",)))
    with pytest.raises(RunError, match="no reply of 2 silos could be used; a: no reply arrived; b: no reply arrived"):
        ask(engine({"a": 1, "b": 2}, faults=Faults(dropout=1.0)))
    with pytest.raises(RunError, match="no reply of 3 silos"):
        engine(faults=Faults(attackers=("a", "b", "c"), attack="nan")).reach(1).total(work, ASKED)


@in_silo
def strange(silo: Silo, body: Down) -> Up:
    return wire.Failure(torch.ones(2) if silo.name == "b" else "no\x1b[2J") if silo.name != "a" else Up({}, 1.0)  # type: ignore


def test_a_failure_is_told_in_one_line_whatever_it_says() -> None:
    one = engine()
    assert [reply.silo for reply in one.reach(1)(strange, ASKED)] == ["a"]
    assert one.rejected == [(1, "b", "tensor([1., 1.])"), (1, "c", "no?[2J")]


def test_replies_after_the_deadline_are_rejected_by_name() -> None:
    one = engine({"a": 0.0, "late": 0.6, "c": 0.0})
    assert [reply.silo for reply in ask(one, slow, deadline=0.4)] == ["a", "c"]
    assert [(number, silo) for number, silo, _ in one.rejected] == [(1, "late")]
    assert "deadline of 0.4 s" in one.rejected[0][2]
    assert len(ask(one, slow)) == 3, "without a deadline all are waited for"
    with pytest.raises(RunError):
        ask(engine({"late": 0.1}), slow, deadline=0.05)


def test_a_bug_in_the_work_is_raised() -> None:
    with pytest.raises(TypeError):
        ask(engine({"a": None}))


@pytest.mark.parametrize("cohort", [1, 2, 3, 4, 100])
def test_silos_pass_in_groups_of_the_cohort_with_equal_replies(cohort: int) -> None:
    data = {f"s{i}": i + 1 for i in range(7)}
    one = engine(data, cohort=cohort)
    found = ask(one, work_together)
    plain = ask(engine(data), work)
    assert [wire.pack(reply.body) for reply in found] == [wire.pack(reply.body) for reply in plain]
    passes = SEEN[: len(SEEN) - 7]
    assert [len(names) for names in passes] == [cohort] * (7 // cohort) + [7 % cohort] * (7 % cohort > 0)
    assert sum(passes, ()) == tuple(data)
    one.commit()
    assert [desk.memory["asked"] for desk in one.desks.values()] == [1] * 7


@pytest.mark.parametrize("cohort", [2, 4])
def test_a_silo_that_cannot_is_lost_alone_from_its_cohort(cohort: int) -> None:
    one = engine({"a": 1, "b": 2, "c": 3, "d": 4}, cohort=cohort)
    found = ask(one, work_together, replace(ASKED, refusing=("b",)))
    assert [(reply.silo, reply.body.weight) for reply in found] == [("a", 1.0), ("c", 3.0), ("d", 4.0)]
    assert one.rejected == [(1, "b", "b has no rows")]
    one.commit()
    assert [desk.memory.get("asked", 0) for desk in one.desks.values()] == [1, 0, 1, 1]


def test_the_measured_plan_is_told_once_and_reused() -> None:
    told: list[dict[str, int]] = []
    data = {f"s{i:02}": i for i in range(9)}
    one = engine(data, cohort="auto", on_plan=lambda plan: told.append(dict(plan)))
    assert [reply.body.loss for reply in ask(one, quick)] == [0.0] * 9, "replies are to the whole body, not the probe"
    assert told == [{f"{__name__}:quick": 4}], "the largest that was faster; eight took longer"
    assert [len(names) for names in SEEN[-3:]] == [4, 4, 1]
    SEEN.clear()
    ask(one, quick)
    assert [len(names) for names in SEEN] == [4, 4, 1], "not measured again"
    assert len(told) == 1


def test_a_plan_given_is_not_measured() -> None:
    one = engine({f"s{i}": i for i in range(6)}, cohort="auto", plan={f"{__name__}:quick": 3})
    one.on_plan = pytest.fail  # type: ignore[assignment]
    ask(one, quick)
    assert [len(names) for names in SEEN] == [3, 3]


@pytest.mark.parametrize("cohort", ["auto", 4])
def test_where_a_cohort_cannot_stand_in_the_plain_step_is_taken(cohort: Any) -> None:
    one = engine({f"s{i}": i for i in range(4)}, cohort=cohort)
    ask(one, quick, Down({}))  # its probe is None
    assert [len(names) for names in SEEN] == [1, 1, 1, 1]


def test_measuring_leaves_memory_and_traffic_alone() -> None:
    data = {f"s{i}": i + 1 for i in range(4)}
    one, plain = engine(data, cohort="auto"), engine(data)
    ask(one, work_together)
    ask(plain, work)
    assert one.traffic == plain.traffic
    one.commit()
    assert [desk.memory for desk in one.desks.values()] == [{"asked": 1}] * 4


def test_faults_strike_after_the_wire() -> None:
    messages: list[bytes] = []
    one = engine(faults=Faults(attackers=("b",)), record=lambda silo, way, data: messages.append(data))
    found = ask(one)
    assert [reply.body.tensors["w"].tolist() for reply in found] == [[1.0, -2.0], [-2.0, 4.0], [5.0, -10.0]]
    assert wire.unpack(messages[3]).tensors["w"].tolist() == [2.0, -4.0], "what silo b sent"


def test_faults_spare_evaluation_and_spare_the_memory() -> None:
    one = engine(faults=Faults(dropout=1.0))
    assert len(list(one.reach(1, disturbed=False)(work, ASKED))) == 3
    with pytest.raises(RunError):
        ask(one)


def test_seeds_are_those_of_the_place_whatever_the_engine_or_the_others() -> None:
    def seeds(one: InProcess, number: int, **more: Any) -> dict[str, int]:
        return {reply.silo: reply.body.value.item() for reply in one.reach(number)(tell_seed, ASKED, **more)}

    first = seeds(engine(), 1)
    assert seeds(engine({"c": 1, "x": 1}), 1)["c"] == first["c"]
    one = engine()
    assert seeds(one, 1, to=["a"])["a"] == first["a"]
    assert seeds(one, 1)["a"] != first["a"], "the second ask of a round"
    assert len({*seeds(engine(), 2).values(), *seeds(engine(seed=1), 1).values(), *first.values()}) == 9


@in_silo
def tell_seed(silo: Silo, body: Down) -> Unchecked:
    return Unchecked(torch.tensor(silo.seed))


def test_the_commit_names_who_took_part_and_counts_asks_anew() -> None:
    one = engine()
    ask(one, to=["a", "c"])
    assert list(one.commit()) == ["a", "c"]
    assert one.commit() == {}
    assert one.next_index(1) == 0
    assert one.next_index(1) == 1
    assert one.next_index(2) == 0


def test_what_is_held_does_not_grow_with_the_replies() -> None:
    """A total over ten times the silos holds no more: 100 kB a reply, so 40 MB if each were kept."""

    def peak(silos: int) -> int:
        one = engine({f"s{i}": 1 for i in range(silos)})
        tracemalloc.start()
        try:
            total = one.reach(1).total(large, Down({}, size=25_000))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert total.weight == silos

    assert peak(440) - peak(40) < 10e6


@dataclass
class Crowd:
    """Silos of twenty short rows: eighteen to train on, one to validate, one to test."""

    count: int
    rows: dict[str, SiloData] = field(init=False)

    def __post_init__(self) -> None:
        rows = tuple(Row(f"{i} is", ("odd", "even")[i % 2 == 0], str(i)) for i in range(20))
        one = SiloData(rows[:18], rows[18:19], rows[19:], labels=("even", "odd"))
        self.rows = {f"silo-{i:04}": one for i in range(self.count)}


def test_a_thousand_silos_of_twenty_rows_run(llama: Resident) -> None:
    crowd = Crowd(1000)
    method = Prefix(virtual_tokens=2, local_steps=1, batch_size=2, optimizer_state="keep")
    experiment = Experiment(
        "crowd", Data(source="x", template="{x}", label="y", silo_column="z"), method,
        rounds=1, participation=0.05, evaluate=Evaluation(),
    )  # fmt: skip
    one = InProcess(crowd.rows, {"base": llama}, rounds=1, cohort=8)
    report = run(experiment, one)
    assert len(report.log[1]["silos"]) == 50
    assert len(report.log[1]["val"]["loss"]["per_silo"]) == 1000
    assert math.isfinite(report.log[1]["train_loss"])
    remembering = [name for name, desk in one.desks.items() if desk.memory]
    assert remembering == report.log[1]["silos"], "who did not take part remembers nothing"
    assert not any(desk.done for desk in one.desks.values()), "no reply outlives its round"
