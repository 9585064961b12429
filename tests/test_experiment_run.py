"""The loop over rounds: samples, the best round, and what goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.core import Silo, in_silo
from fedtailor.data import Data, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.evaluate import Evaluation
from fedtailor.experiment import Experiment, _improved, name_of, run, sampled
from fedtailor.faults import Faults
from fedtailor.generations import Generations
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident

wire.allow(__name__)


SILOS = tuple(f"s{i}" for i in range(10))


@given(st.integers(1, 40), st.floats(0.001, 1.0), st.integers(0, 5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_sample_is_seeded_in_silo_order_and_never_empty(count: int, share: float, seed: int, number: int) -> None:
    silos = [f"s{i}" for i in range(count)]
    found = sampled(silos, share, seed, number)
    assert len(found) == max(1, round(share * count))
    assert list(found) == [silo for silo in silos if silo in found]
    assert found == sampled(silos, share, seed, number)


def test_samples_differ_by_round_and_seed_and_reach_everyone() -> None:
    rounds = [sampled(SILOS, 0.3, 0, number) for number in range(1, 31)]
    assert len(set(rounds)) > 10
    assert {silo for found in rounds for silo in found} == set(SILOS)
    assert rounds != [sampled(SILOS, 0.3, 1, number) for number in range(1, 31)]
    assert sampled(SILOS, 1.0, 0, 1) == SILOS


@dataclass(frozen=True)
class Asked:
    number: int


@dataclass(frozen=True)
class Told:
    times: int
    seed: int


@dataclass(frozen=True)
class Count:
    asked: int = 0
    seeds: tuple[int, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Counter:
    """Counts how often each silo was asked, in its memory; opens as the plain base."""

    fail_at: int = 0

    def begin(self, ask: Any) -> Count:
        return Count()

    def round(self, state: Count, ask: Any) -> Count:
        if ask.round == self.fail_at:
            raise KeyboardInterrupt
        told = [reply.body for reply in ask(times, Asked(ask.round))]
        return Count(
            state.asked + len(told), (*state.seeds, *(t.seed for t in told)), {"most": max(t.times for t in told)}
        )

    def serve(self, state: Count) -> Any:
        from fedtailor.baselines import Bare

        return Bare(before="x" * state.asked)


@in_silo
def times(silo: Silo, body: Asked) -> Told:
    silo.memory["times"] = silo.memory.get("times", 0) + 1
    return Told(silo.memory["times"], silo.seed)


def counting(rounds: int = 4, **more: Any) -> Experiment:
    data = Data(source="x", template="{x}", label="y", silo_column="z")
    return Experiment("counting", data, Counter(), rounds=rounds, **more)


@pytest.fixture
def engine(rated: dict[str, SiloData], llama: Resident) -> Callable[..., InProcess]:
    return lambda **more: InProcess(rated, {"base": llama}, rounds=4, **more)


def test_every_round_asks_its_sample_and_is_logged(engine: Callable[..., InProcess]) -> None:
    report = run(counting(participation=0.67), one := engine())
    assert [entry["round"] for entry in report.log] == [0, 1, 2, 3, 4]
    assert [entry.get("silos") for entry in report.log] == [None] + [
        list(sampled(one.silos, 0.67, 0, number)) for number in range(1, 5)
    ]
    asked = [silo for entry in report.log[1:] for silo in entry["silos"]]
    assert {name: desk.memory.get("times", 0) for name, desk in one.desks.items()} == {
        name: asked.count(name) for name in one.silos
    }
    assert report.log[4]["most"] == max(map(asked.count, one.silos))
    assert all(set(entry["val"]) == {"accuracy", "loss", "macro_f1"} for entry in report.log)
    assert report.log[0]["bytes_up"] == 0, "this method asks nothing to begin"
    assert all(entry["bytes_up"] > 0 and entry["evaluation_bytes_up"] > 0 for entry in report.log[1:])


def test_the_best_round_is_the_one_that_validated_best(engine: Callable[..., InProcess]) -> None:
    report = run(counting(), engine())
    losses = [entry["val"]["loss"]["mean"] for entry in report.log]
    assert report.best_round == losses.index(min(losses))
    assert report.state.asked == 3 * report.best_round
    by_accuracy = run(counting(evaluate=Evaluation(best_by="accuracy")), engine())
    accuracies = [entry["val"]["accuracy"]["mean"] for entry in by_accuracy.log]
    assert by_accuracy.best_round == accuracies.index(max(accuracies))


def test_validation_may_be_seldom_and_the_last_round_always_has_it(engine: Callable[..., InProcess]) -> None:
    report = run(counting(evaluate=Evaluation(every=3)), engine())
    assert [entry["round"] for entry in report.log if "val" in entry] == [0, 3, 4]


def test_test_rows_are_not_touched(rated: dict[str, SiloData], llama: Resident) -> None:
    without = {name: replace(rows, test=()) for name, rows in rated.items()}
    one = run(counting(), InProcess(rated, {"base": llama}, rounds=4))
    other = run(counting(), InProcess(without, {"base": llama}, rounds=4))
    assert (one.state, one.best_round) == (other.state, other.best_round)
    assert [entry["val"] for entry in one.log] == [entry["val"] for entry in other.log]


def test_without_validation_rows_the_last_round_is_served(rated: dict[str, SiloData], llama: Resident) -> None:
    without = {name: replace(rows, val=()) for name, rows in rated.items()}
    report = run(counting(), InProcess(without, {"base": llama}, rounds=4))
    assert (report.best_round, report.state.asked) == (4, 12)


def test_an_interrupted_run_goes_on_to_the_same_end(engine: Callable[..., InProcess], tmp_path: Path) -> None:
    whole = run(counting(), engine(), Generations(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(counting(), engine(), Generations(tmp_path / "cut"), Counter(fail_at=3))
    kept = Generations(tmp_path / "cut").newest()
    assert kept is not None
    assert kept.round == 2
    rest = run(counting(), one := engine(), Generations(tmp_path / "cut"))
    assert (rest.state, rest.best_round) == (whole.state, whole.best_round)
    assert {name: desk.memory for name, desk in one.desks.items()} == {name: {"times": 4} for name in one.silos}
    assert [entry["val"] for entry in rest.log] == [entry["val"] for entry in whole.log]


def test_a_finished_run_asks_nothing_more(engine: Callable[..., InProcess], tmp_path: Path) -> None:
    done = run(counting(), engine(), Generations(tmp_path))
    again = run(counting(), one := engine(), Generations(tmp_path))
    assert again.state == done.state
    assert one.traffic.take() == (0, 0)


def test_rejections_are_logged_by_silo_and_evaluation_is_not_disturbed(engine: Callable[..., InProcess]) -> None:
    method = Lora(local_steps=1, batch_size=2, rank=2)
    report = run(replace(counting(rounds=2), method=method), engine(faults=Faults(attackers=("shop",), attack="nan")))
    assert report.log[0]["rejected"] == {}
    for entry in report.log[1:]:
        assert list(entry["rejected"]) == ["shop"]
        assert "not finite" in entry["rejected"]["shop"]
        assert len(entry["val"]["loss"]["per_silo"]) == 3
    assert all(bool(t.isfinite().all()) for t in report.state.tensors.values())
    assert any(not torch.equal(t, torch.zeros_like(t)) for n, t in report.state.tensors.items() if "lora_B" in n)


def test_a_silo_that_misses_a_validation_does_not_change_whom_rounds_are_compared_over() -> None:
    before = {"easy": 0.2, "hard": 1.0}
    assert not _improved("loss", {"easy": 0.3}, before), "a lower mean, over the easy silo alone"
    assert _improved("loss", {"easy": 0.1}, before)
    assert _improved("accuracy", {"easy": 0.3, "hard": 0.9, "new": 0.0}, {"easy": 0.2, "hard": 0.9})
    assert not _improved("loss", {"new": 0.0}, before)


def test_a_method_is_named_as_it_is_found() -> None:
    assert name_of(Prefix) == "prefix"
    assert name_of(Counter) == f"{__name__}:Counter"
