"""The contract, over every method found: whatever is in methods/ is driven through the real loop, and kept to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from fedtailor import find, wire
from fedtailor.baselines import zero_shot
from fedtailor.core import Silo
from fedtailor.data import Data, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.evaluate import Evaluate, Evaluation, evaluate
from fedtailor.experiment import Experiment, Report, run
from fedtailor.methods.averaging import Averaging, Begin, Train, start, train
from fedtailor.models import Resident
from fedtailor.tiny import KINDS
from fedtailor.tuned import Tensors
from tiny_runs import PUBLIC

Rated = Callable[[str], dict[str, SiloData]]
SMALL = {"local_steps": 2, "batch_size": 2, "virtual_tokens": 4, "rank": 2, "projection_size": 8, "calls": 24, "dimensions": 8}
# of those that answer by asking, there is nothing to learn from rows: tests/test_rag.py
METHODS = sorted(name for name, kind in find.methods().items() if not hasattr(kind, "judge"))
PROJECTED = [(name, True) for name in METHODS if "projection" in {f.name for f in fields(find.methods()[name])}]
VARIANTS = [*((name, False) for name in METHODS), *PROJECTED]
ARCHITECTURES = KINDS
FLAT = ("vision", "seq2seq")  # kinds whose prefix is our own, and has no projection
CLAIMED = [  # what each method says it can be put on
    pytest.param(base, name, projection, id=f"{base}-{name}{'-projected' * projection}")
    for base, kind in ARCHITECTURES.items()
    for name, projection in VARIANTS
    if kind in getattr(find.methods()[name], "FOR", (kind,)) and not (projection and kind in FLAT)
]
WRITING = [one for one in CLAIMED if ARCHITECTURES[str(one.values[0])] in ("causal", "seq2seq")]
claimed = pytest.mark.parametrize(("architecture", "name", "projection"), CLAIMED)
writing = pytest.mark.parametrize(("architecture", "name", "projection"), WRITING)
variants = pytest.mark.parametrize(
    ("name", "projection"), VARIANTS, ids=["-projected".join([n, ""]) if p else n for n, p in VARIANTS]
)


def made(name: str, projection: bool = False, **more: Any) -> Any:
    kind = find.method(name)
    known = {f.name for f in fields(kind)}
    # AdamW divides by the gradient's size: at a large rate two roundings of a gradient of 0 end far apart
    rate = {"lr": min(kind().lr, 2e-3)} if "lr" in known else {}
    settings = {k: v for k, v in {**SMALL, **rate, "projection": projection, **more}.items() if k in known}
    return kind(**settings)


def ran(base: Resident, data: Mapping[str, SiloData], method: Any, seed: int = 0, **more: Any) -> Report:
    rounds = more.pop("rounds", 3)
    engine = InProcess(data, {"base": base}, seed=seed, rounds=rounds, public=PUBLIC, **more)
    experiment = Experiment(
        "any", Data(source="-", template="{x}", answer="x", silo_column="x"), method, rounds=rounds,
        evaluate=Evaluation(max_new_tokens=4),
    )  # fmt: skip
    return run(experiment, engine, seed=seed)


def bits(base: Resident) -> Tensors:
    base.tuned()  # nothing on it
    return {n: t.clone() for n, t in base.module.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(t, other[n]) for n, t in one.items())


def test_the_methods_of_the_first_issue_are_found() -> None:
    assert {"full", "lora", "prefix"} <= set(METHODS)


@variants
def test_a_method_is_a_frozen_dataclass_that_crosses_the_wire(name: str, projection: bool) -> None:
    method = made(name, projection)
    assert is_dataclass(method)
    assert type(method).__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert wire.unpack(wire.pack(method)) == method
    assert all(hasattr(method, part) for part in ("begin", "round", "serve", "pooled"))


@claimed
def test_three_rounds(
    resident_of: Callable[[str], Resident], rated_for: Rated, architecture: str, name: str, projection: bool
) -> None:
    """It learns, stays finite, answers, leaves the base alone, and does the same again with the same seed only."""
    base, method, rated = resident_of(architecture), made(name, projection), rated_for(architecture)
    before = bits(base)
    engine = InProcess(rated, {"base": base}, public=PUBLIC)
    begun = wire.tensors_of(method.begin(engine.reach(0)))
    report = ran(base, rated, method)
    assert [entry["round"] for entry in report.log] == [0, 1, 2, 3]
    assert all(math.isfinite(entry["val"]["loss"]["mean"]) for entry in report.log)
    assert all(math.isfinite(entry["train_loss"]) for entry in report.log[1:] if "train_loss" in entry)
    assert all(entry["rejected"] == {} for entry in report.log)
    assert all(entry["bytes_up"] > 0 and entry["bytes_down"] > 0 for entry in report.log)
    learnt = wire.tensors_of(report.state)
    assert all(bool(t.isfinite().all()) for t in learnt.values())
    moved = wire.tensors_of(method.round(method.begin(engine.reach(0)), engine.reach(1)))
    if begun:
        assert any(not torch.equal(t, begun[n]) for n, t in moved.items() if n in begun), "a round changed nothing"

    served = wire.unpack(wire.pack(report.served))
    model = served.open({"base": base})
    scores = model.scores(rated["zoo"].test, rated["zoo"].labels)
    assert scores.shape == (3, 2)
    assert bool(scores.isfinite().all())
    if not base.classifier:
        told = model.generate(rated["zoo"].test, max_new_tokens=4)
        assert len(told) == 3
        assert all(isinstance(text, str) for text in told)
    assert same(bits(base), before), "the base was changed"

    torch.manual_seed(12345)
    again = ran(base, rated, method)
    assert same(wire.tensors_of(again.state), learnt), "same seed, other tensors"
    assert again.best_round == report.best_round
    assert [entry["val"] for entry in again.log] == [entry["val"] for entry in report.log]
    last = wire.pack(ran(base, rated, method, seed=1, rounds=1).state)
    assert last != wire.pack(ran(base, rated, method, seed=0, rounds=1).state), "the seed is not used"


@writing
def test_three_rounds_of_writing(
    resident_of: Callable[[str], Resident], written: Mapping[str, SiloData], architecture: str, name: str, projection: bool
) -> None:
    causal = resident_of(architecture)
    report = ran(causal, written, made(name, projection))
    assert all(math.isfinite(entry["val"]["loss"]["mean"]) for entry in report.log)
    served = report.served.open({"base": causal})
    assert len(served.generate(written["cafe"].test, max_new_tokens=4)) == 2


@claimed
def test_every_trainable_tensor_survives_the_wire(
    resident_of: Callable[[str], Resident], rated_for: Rated, architecture: str, name: str, projection: bool
) -> None:
    """State, what is served, and, in the gradient family, what goes down and comes up: bit for bit."""
    base, method, rated = resident_of(architecture), made(name, projection), rated_for(architecture)
    state = method.begin(InProcess(rated, {"base": base}, public=PUBLIC).reach(0))
    bodies = [state, method.serve(state)]
    if isinstance(method, Averaging):
        silo = Silo("zoo", rated["zoo"], {"base": base}, 3)
        down = Train(method, state.tensors, method.lrs(1, 3))
        bodies += [Begin(method), start(silo, Begin(method)), down, train(silo, down)]
        trainable = method.put_on(base, 2).tensors()
        assert {n: t.shape for n, t in state.tensors.items()} == {n: t.shape for n, t in trainable.items()}
        assert set(bodies[-1].delta) == set(trainable), "a trainable tensor did not travel"
    for body in bodies:
        packed = wire.pack(body)
        back = wire.unpack(packed)
        assert type(back) is type(body)
        sent, got = wire.tensors_of(body), wire.tensors_of(back)
        assert set(sent) == set(got)
        for n, t in sent.items():
            assert t.dtype == got[n].dtype
            assert t.shape == got[n].shape
            assert t.contiguous().view(torch.uint8).equal(got[n].contiguous().view(torch.uint8)), n
        assert wire.pack(back) == packed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_resident_through_all_methods(
    resident_of: Callable[[str], Resident], rated_for: Rated, architecture: str
) -> None:
    """Whatever was on it comes off cleanly: the zero-shot scores are bit for bit those from before."""
    base, rated = resident_of(architecture), rated_for(architecture)
    before = bits(base)
    rows, labels = rated["shop"].test, rated["shop"].labels

    def bare() -> torch.Tensor:
        scores: torch.Tensor = zero_shot(rated).open({"base": base}).scores(rows, labels)
        return scores

    expected = bare()
    finals: dict[Any, Tensors] = {}
    mine = [one.values[1:] for one in CLAIMED if one.values[0] == architecture]
    for name, projection in [*mine, *mine[::-1]]:  # every one after every kind of other, and twice
        method = made(name, projection)
        got = wire.tensors_of(ran(base, rated, method, rounds=1).state)
        assert same(finals.setdefault((name, projection), got), got), "depends on what was on the base before"
        assert torch.equal(bare(), expected), f"after {name}"
    assert same(bits(base), before)
    module = "".join(n for n, _ in base.module.named_modules()) + "".join(n for n, _ in base.module.named_parameters())
    assert "lora" not in module
    assert "prompt_encoder" not in module
    assert not any(p.requires_grad for p in base.module.parameters())


@claimed
def test_any_cohort_size_gives_the_same(
    resident_of: Callable[[str], Resident], rated_for: Rated, architecture: str, name: str, projection: bool
) -> None:
    causal, rated = resident_of(architecture), rated_for(architecture)
    method = made(name, projection)
    one = wire.tensors_of(ran(causal, rated, method, cohort=1).state)
    for size in (2, 3):
        other = wire.tensors_of(ran(causal, rated, method, cohort=size).state)
        assert all(torch.allclose(t, other[n], atol=1e-5, rtol=0) for n, t in one.items()), size


@claimed
def test_evaluation_opens_what_is_served(
    resident_of: Callable[[str], Resident], rated_for: Rated, architecture: str, name: str, projection: bool
) -> None:
    any_resident, rated = resident_of(architecture), rated_for(architecture)
    method = made(name, projection)
    served = method.serve(method.begin(InProcess(rated, {"base": any_resident}, public=PUBLIC).reach(0)))
    counts = evaluate(Silo("zoo", rated["zoo"], {"base": any_resident}, 0), Evaluate(served, "test", 4))
    assert counts.rows == 3
    assert sum(map(sum, counts.confusion)) == 3
    assert counts.nll > 0
