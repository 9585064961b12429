"""Exchanges of a search with silos that are not equally far: drawn now and then, lost, silent, shy of few rows, new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError
from fedtailor.faults import Faults
from fedtailor.limits import Limits
from fedtailor.methods.search import Search
from fedtailor.models import Resident
from judged import PROMPTS, judged, searched


def test_silos_drawn_now_and_then_are_asked_for_all_their_rows(llama: Resident) -> None:
    """Each from where it is: no row is passed over because another silo was drawn."""
    data = judged(rows=20)
    engine = InProcess(data, {"base": llama}, rounds=6)
    method = Search(prompts=PROMPTS[:2], proposals=0, bandit="halving", calls=24)
    state = method.begin(engine.reach(0))
    for number, silos in enumerate([("silo-0",), ("silo-1",), ("silo-0", "silo-2"), ("silo-1", "silo-2"), ("silo-2",)] * 2, 1):
        before = state.known.counts.sum(0)
        state = method.round(state, engine.reach(number, silos))
        engine.commit()
        assert int((state.known.counts.sum(0) - before).max()) <= 24
    assert engine.rejected == []
    assert state.known.counts.tolist() == [[20, 20, 20]] * 2


@pytest.mark.parametrize("noise", ["none", "laplace"])
def test_a_lost_reply_holds_up_nothing(llama: Resident, noise: Any) -> None:
    """Without noise it is made good; under noise the silo tells of these rows no second time, and goes on."""
    engine = InProcess(judged(rows=20), {"base": llama}, faults=Faults(dropout=0.2), rounds=4, seed=3)
    method = Search(prompts=PROMPTS[:2], proposals=0, calls=24, noise=noise, bandit="halving")
    state = method.begin(engine.reach(0, disturbed=False))
    for number in (1, 2, 3, 4):
        state = method.round(state, engine.reach(number))
        engine.commit()
    assert engine.rejected
    assert int(state.known.counts.max()) <= 20
    lost = sum(20 - n for n in state.known.counts.flatten().tolist())
    assert state.known.reached.tolist() == [[20, 20, 20]] * 2
    assert lost == 0 if noise == "none" else 0 < lost <= 2 * 12 * len(engine.rejected)


def test_a_silo_that_never_answers_holds_up_nothing(llama: Resident) -> None:
    data = judged(rows=20)
    engine = InProcess(data, {"base": llama}, rounds=2)
    engine.desks["silo-1"].data = replace(data["silo-1"], limits=Limits(epsilon=1.0))  # says nothing without noise
    method = Search(prompts=PROMPTS[:2], proposals=0, bandit="halving", calls=60)
    state = method.begin(engine.reach(0))
    for number in (1, 2):
        state = method.round(state, engine.reach(number))
    assert state.known.counts.tolist() == [[20, 0, 20]] * 2
    assert state.quiet == ("silo-1",)


def test_a_silo_with_a_larger_minimum_is_asked_for_so_many_rows(llama: Resident) -> None:
    data = judged(rows=30)
    data["silo-1"] = replace(data["silo-1"], settings={"minimum": 12})
    state = searched(llama, data, Search(prompts=PROMPTS[:2], proposals=0, calls=120), rounds=2)
    assert state.floors == (1, 12, 1)
    assert state.notes["declined"] > 0
    assert int(state.known.counts.sum(0)[1]) >= 24


def test_a_round_in_which_no_silo_says_anything_is_told(llama: Resident) -> None:
    data = {name: replace(rows, settings={"minimum": 70}) for name, rows in judged(rows=80).items()}
    engine = InProcess(data, {"base": llama})
    method = Search(prompts=PROMPTS[:4], proposals=0, calls=60)
    state = method.begin(engine.reach(0))
    with pytest.raises(RunError, match=r"no silo tried a prompt: silo-0, .* 70 rows or more, .* set calls to 374"):
        method.round(state, engine.reach(1))
    assert engine.traffic.down < 30_000, "nor is it asked again and again"


def test_a_silo_that_joins_a_search_takes_part(llama: Resident) -> None:
    data = judged(rows=20)
    method = Search(prompts=PROMPTS[:2], proposals=0, bandit="halving", calls=40)
    two = InProcess({name: data[name] for name in ("silo-0", "silo-2")}, {"base": llama})
    state = method.round(method.begin(two.reach(0)), two.reach(1))
    three = InProcess(data, {"base": llama})
    state = method.round(state, three.reach(2))
    assert state.silos == ("silo-0", "silo-2", "silo-1")
    assert state.known.counts.tolist() == [[20, 20, 20]] * 2


def test_epsilon_told_is_the_most_that_was_ever_told(llama: Resident) -> None:
    """Though the silo that told it is not in the later round."""
    engine = InProcess(judged(), {"base": llama})
    method = Search(prompts=PROMPTS[:3], proposals=0, noise="laplace", epsilon=2.0, calls=120, keep=1)
    state = method.round(method.begin(engine.reach(0)), engine.reach(1, ["silo-0"]))
    first = state.notes["epsilon"]
    assert first == pytest.approx(2)
    state = method.round(state, engine.reach(2, ["silo-1"]))
    assert state.notes["epsilon"] == first, "though silo-1 tried the winner alone"
    assert 0 <= state.notes["score"] <= 1
