"""The template of the gradient family: what a silo sends, what the server makes of it, both checked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import find, wire
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, SiloError
from fedtailor.methods.averaging import (
    Averaging,
    Begin,
    Train,
    Trained,
    per_silo,
    probe,
    start,
    train,
    train_many,
)
from fedtailor.methods.full import Full
from fedtailor.methods.ia3 import IA3
from fedtailor.methods.layernorm import LayerNorm
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.methods.scaffold import Shift
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, norm

Silos = Mapping[str, SiloData]
SMALL: dict[str, Any] = {"local_steps": 10, "batch_size": 2}
METHODS: dict[str, Averaging] = {
    "prefix": Prefix(virtual_tokens=4, **SMALL),
    "projected": Prefix(virtual_tokens=4, projection=True, projection_size=16, lr=3e-3, **SMALL),
    "lora": Lora(rank=2, **SMALL),
}


def silos_of(base: Resident, data: Silos, memory: Mapping[str, Any] | None = None) -> list[Silo]:
    given = memory or {}
    return [Silo(n, d, {"base": base}, 5 + i, dict(given.get(n, {}))) for i, (n, d) in enumerate(data.items())]


def asked(base: Resident, data: Silos, method: Averaging, rounds: int = 3, number: int = 1) -> Train:
    begun = start(silos_of(base, data)[0], Begin(method))
    return Train(method, begun.tensors, method.lrs(number, rounds))


def agree(one: Trained | wire.Failure, other: Trained | wire.Failure, atol: float) -> None:
    assert isinstance(one, Trained)
    assert isinstance(other, Trained)
    assert set(one.delta) == set(other.delta)
    for n, d in one.delta.items():
        assert torch.allclose(d, other.delta[n], atol=atol, rtol=0), n
    assert one.weight == other.weight
    assert one.loss == pytest.approx(other.loss, abs=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_a_cohort_replies_as_each_silo_alone_would(any_resident: Resident, rated: Silos, kind: str) -> None:
    body = asked(any_resident, rated, METHODS[kind])
    together = train_many(silos_of(any_resident, rated), body)
    apart = [train(silo, body) for silo in silos_of(any_resident, rated)]
    for one, other in zip(together, apart, strict=True):
        agree(one, other, 1e-5)
        assert other.weight == 20
        assert max(d.abs().max().item() for d in other.delta.values()) > 1e-3


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_a_cohort_keeps_each_silos_moments(llama: Resident, written: Silos, state: Any) -> None:
    """Silos that took part in other rounds have other step counts."""
    method = replace(METHODS["lora"], optimizer_state=state, local_steps=3)
    body = asked(llama, written, method)
    memory: dict[str, dict[str, Any]] = {n: {} for n in written}
    for name, rounds in (("shop", 1), ("zoo", 2)):
        silo = Silo(name, written[name], {"base": llama}, 1, memory[name])
        for _ in range(rounds):
            train(silo, body)
    if state == "keep":
        steps = [{t.item() for n, t in memory[s]["moments"].items() if n.startswith("step/")} for s in ("shop", "zoo")]
        assert steps == [{3}, {6}]
    else:
        assert memory == {n: {} for n in written}
    together, apart = silos_of(llama, written, memory), silos_of(llama, written, memory)
    for one, other in zip(train_many(together, body), [train(silo, body) for silo in apart], strict=True):
        agree(one, other, 1e-5)
    for one_, other_ in zip(together, apart, strict=True):
        assert set(one_.memory) == set(other_.memory) == ({"moments"} if state == "keep" else set())
        for n, t in one_.memory.get("moments", {}).items():
            assert torch.allclose(t, other_.memory["moments"][n], atol=1e-5)


def test_kept_moments_matter_and_cross_the_wire(llama: Resident, written: Silos) -> None:
    from fedtailor.generations import Memory

    method = replace(METHODS["lora"], optimizer_state="keep")
    body, silo = asked(llama, written, method), silos_of(llama, written)[0]
    first = train(silo, body)
    kept = wire.unpack(wire.pack(Memory(silo.memory))).values
    assert all(torch.equal(t, silo.memory["moments"][n]) for n, t in kept["moments"].items())
    second = train(Silo(silo.name, silo.data, silo.models, silo.seed, kept), body)
    assert any((second.delta[n] - d).abs().max() > 1e-4 for n, d in first.delta.items())


def test_a_diverged_silo_is_a_named_failure(llama: Resident, written: Silos) -> None:
    body = asked(llama, written, replace(METHODS["prefix"], optimizer_state="keep"))
    ruined = {"moments": {f"m/{n}": torch.full_like(t, math.inf) for n, t in body.tensors.items()}}
    silos = silos_of(llama, written, {"shop": ruined})
    cafe, shop, zoo = train_many(silos, body)
    assert isinstance(shop, wire.Failure)
    assert "loss became" in shop.error
    assert isinstance(cafe, Trained)
    assert isinstance(zoo, Trained)
    with pytest.raises(SiloError, match="loss became"):
        train(silos_of(llama, written, {"shop": ruined})[1], body)


def test_a_silo_with_settings_of_its_own(llama: Resident, written: Silos) -> None:
    """As if the whole method were set so, at that silo alone; the others train as before."""
    own = {"lr": 2e-3, "local_steps": 5, "batch_size": 3, "optimizer": "sgd", "clip": 0.5}
    method = METHODS["prefix"]
    body = asked(llama, written, method)
    data = {**written, "shop": replace(written["shop"], settings=own)}
    replies = train_many(silos_of(llama, data), body)
    plain = train_many(silos_of(llama, written), body)
    agree(replies[0], plain[0], 1e-5)
    agree(replies[2], plain[2], 1e-5)
    method = replace(method, **own)
    lrs = tuple(body.lrs[i] * 2e-3 / 1e-2 for i in (0, 2, 4, 6, 8))  # the round's schedule over half the steps
    silo = silos_of(llama, written)[1]
    agree(replies[1], train(silo, Train(method, body.tensors, lrs)), 1e-7)
    assert isinstance(replies[1], Trained)
    assert replies[1].weight == 15


def test_rounds_continue_the_schedule() -> None:
    method = Full(lr=1.0, local_steps=2, schedule="linear")
    lrs = [lr for number in (1, 2) for lr in method.lrs(number, 2)]
    assert lrs == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8])  # 1 - (i + 1/2) / 4
    warm = replace(method, schedule="constant", warmup_rounds=1)
    assert [lr for number in (1, 2) for lr in warm.lrs(number, 2)] == pytest.approx([1 / 4, 3 / 4, 1, 1])
    assert replace(method, schedule="cosine").lrs(2, 2)[1] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 5))
def test_no_step_is_without_a_rate(steps: int, rounds: int, schedule: Any, warmup: float) -> None:
    method = Full(lr=0.1, local_steps=steps, schedule=schedule, warmup_rounds=min(warmup, rounds))
    lrs = [lr for number in range(1, rounds + 1) for lr in method.lrs(number, rounds)]
    assert len(lrs) == steps * rounds
    assert all(0 < lr <= 0.1 + 1e-9 for lr in lrs)


def engine(base: Resident, data: Silos, rounds: int = 2, **more: Any) -> InProcess:
    return InProcess(data, {"base": base}, rounds=rounds, **more)


@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed_mean", "fedtailor.aggregate:mean"])
def test_a_round_is_the_weighted_mean_of_the_changes(llama: Resident, written: Silos, aggregate: str) -> None:
    """Weights are rows seen: cafe 2 steps of 2, shop 2 of 6, zoo 1 of 2."""
    data = {
        "cafe": written["cafe"],
        "shop": replace(written["shop"], settings={"batch_size": 6}),
        "zoo": replace(written["zoo"], settings={"local_steps": 1}),
    }
    method = Prefix(virtual_tokens=2, local_steps=2, batch_size=2, aggregate=aggregate, byzantine=0.34)
    made = engine(llama, data)
    state = method.begin(made.reach(0))
    before = {n: t.clone() for n, t in state.tensors.items()}
    after = method.round(state, made.reach(1))
    replies = {
        r.silo: r.body for r in engine(llama, data).reach(1)(train, Train(method, before, method.lrs(1, 2)))
    }
    weights = {"cafe": 4, "shop": 12, "zoo": 2}
    assert {name: r.weight for name, r in replies.items()} == weights
    for n, t in before.items():
        deltas = [r.delta[n] for r in replies.values()]
        if aggregate in ("median", "trimmed_mean"):  # of three, without one at each end
            expected = torch.stack(deltas).sort(0).values[1]
        else:
            expected = (4 * deltas[0] + 12 * deltas[1] + 2 * deltas[2]) / 18
        assert torch.allclose(after.tensors[n], t + expected, atol=1e-6)
    loss = sum(weights[name] * r.loss for name, r in replies.items()) / 18
    assert after.notes["train_loss"] == pytest.approx(loss, rel=1e-6)
    moved = torch.cat([(after.tensors[n] - t).flatten() for n, t in before.items()]).norm().item()
    assert after.notes["delta_norm"] == pytest.approx(moved, rel=1e-4)


def test_a_rejected_reply_is_not_averaged_in(llama: Resident, written: Silos) -> None:
    from fedtailor.faults import Faults

    method = Prefix(virtual_tokens=2, local_steps=1, batch_size=2)
    struck = engine(llama, written, faults=Faults(attackers=("shop",), attack="nan"))
    state = method.begin(struck.reach(0))
    after = method.round(state, struck.reach(1))
    assert [(silo, why.split(" ")[-1]) for _, silo, why in struck.rejected] == [("shop", "finite")]
    without = engine(llama, written)
    expected = method.round(state, without.reach(1, ("cafe", "zoo")))
    assert all(torch.equal(t, expected.tensors[n]) for n, t in after.tensors.items())
    everyone = engine(llama, written, faults=Faults(attackers=1.0, attack="nan"))
    with pytest.raises(RunError, match=r"round 1.*cafe: .* is not finite"):
        method.round(state, everyone.reach(1))


def one(value: float) -> Tensors:
    return {"w": torch.tensor([value])}


GOOD = Trained({"a": torch.zeros(2, 3), "b": torch.ones(1)}, 16.0, 1.0)
ASKED = Train(Full(local_steps=2, batch_size=8), {"a": torch.ones(2, 3), "b": torch.ones(1)}, (0.1, 0.1))
BAD: dict[str, tuple[Trained, str]] = {
    "a name less": (replace(GOOD, delta={"a": torch.zeros(2, 3)}), "names differ from those asked, first 'b'"),
    "a name more": (replace(GOOD, delta={**GOOD.delta, "c": torch.ones(1)}), "first 'c'"),
    "another shape": (replace(GOOD, delta={**GOOD.delta, "a": torch.zeros(3, 2)}), "asked float32 (2, 3)"),
    "another type": (replace(GOOD, delta={**GOOD.delta, "b": torch.ones(1).bfloat16()}), "torch.bfloat16"),
    "a NaN": (replace(GOOD, delta={**GOOD.delta, "b": torch.tensor([math.nan])}), "delta/b is not finite"),
    "an infinity": (replace(GOOD, delta={**GOOD.delta, "b": torch.tensor([-math.inf])}), "delta/b is not finite"),
    "no weight": (replace(GOOD, weight=0.0), "weight 0.0 is out of bounds"),
    "a negative weight": (replace(GOOD, weight=-1.0), "out of bounds"),
    "a huge weight": (replace(GOOD, weight=1e12), "out of bounds"),
    "a NaN loss": (replace(GOOD, loss=math.nan), "loss is nan"),
    "a NaN weight": (replace(GOOD, weight=math.nan), "out of bounds"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reply_is_named(what: str) -> None:
    body, why = BAD[what]
    found = body.problem(ASKED)
    assert found is not None
    assert why in found
    assert GOOD.problem(ASKED) is None


def test_the_norm_is_over_all_tensors() -> None:
    """3-4-5: each tensor alone is within 4.5."""
    body = Trained({"a": torch.tensor([[3.0, 0, 0], [0, 0, 0]]), "b": torch.tensor([4.0])}, 16.0, 1.0)
    at = lambda limit: body.problem(replace(ASKED, method=replace(ASKED.method, max_delta_norm=limit)))  # noqa: E731
    assert at(5.01) is None
    assert at(None) is None
    assert at(4.99) == "norm 5 is above method.max_delta_norm = 4.99"


def test_a_reply_weighs_what_the_method_says(llama: Resident, written: Silos) -> None:
    """20 rows seen by each; held: as many as each silo has to train on."""
    for weigh, expected in (("seen", [20.0] * 3), ("held", [float(len(data.train)) for data in written.values()])):
        body = asked(llama, written, replace(METHODS["lora"], weigh=weigh))
        replies = [train(silo, body) for silo in silos_of(llama, written)]
        assert [reply.weight for reply in replies] == expected
        assert all(reply.problem(body) is None for reply in replies)
    assert "out of bounds" in str(replace(replies[0], weight=2.0**32).problem(body))


def test_the_servers_rate_follows_its_schedule(llama: Resident, written: Silos) -> None:
    """Of 2 rounds, linear: the middle of each, .75 and .25 of server_lr."""
    method = Lora(local_steps=1, batch_size=2, gap=False, server_lr=2.0, server_schedule="linear")
    at = engine(llama, written)
    state = method.begin(at.reach(0))
    for number, lr in ((1, 1.5), (2, 0.5)):
        body, before = method.asked(state, at.reach(number)), state
        delta = {n: torch.ones_like(t) for n, t in body.tensors.items()}
        state = method.stepped(state, at.reach(number), body, delta, {}, Shift({}, ()))
        for n, t in state.tensors.items():
            assert torch.allclose(t, before.tensors[n] + lr), n


@pytest.mark.parametrize(
    ("kind", "rate"), [("none", 1.0), ("momentum", 1.0), ("adam", 0.01), ("yogi", 0.01)]
)
def test_the_servers_rate_suits_its_optimizer(llama: Resident, written: Silos, kind: Any, rate: float) -> None:
    """By hand, all changes 1e-3: adam and yogi move lr * .1 d / (sqrt(.01) d) = lr in the first round, others by d."""
    method = Lora(local_steps=1, batch_size=2, server_optimizer=kind)
    assert method.server_rate == rate
    assert replace(method, server_lr=0.5).server_rate == 0.5
    at = engine(llama, written)
    state = method.begin(at.reach(0))
    body = method.asked(state, at.reach(1))
    delta = {n: torch.full_like(t, 1e-3) for n, t in body.tensors.items()}
    after = method.stepped(state, at.reach(1), body, delta, {}, Shift({}, ()))
    for n, t in after.tensors.items():
        moved = 1e-3 if rate == 1 else 0.01 * 1e-4 / ((1e-12 * (0.99 if kind == "adam" else 1) + 1e-8) ** 0.5 + 1e-6)
        assert torch.allclose(t - body.tensors[n], torch.full_like(t, moved), atol=2e-7)


def test_kept_moments_count_each_factors_steps(llama: Resident, written: Silos) -> None:
    """AdamW's first step is lr in every number: A's first, in the second round, too."""
    method = Lora(rank=2, combine="alternate", optimizer_state="keep", local_steps=1, batch_size=2, clip=0, schedule="constant")
    at = engine(llama, written)
    state = method.begin(at.reach(0))
    at.commit()
    for number in (1, 2):
        silo = silos_of(llama, written, {n: at.desks[n].memory for n in written})[0]
        delta = train(silo, method.asked(state, at.reach(number))).delta
        largest = max(d.abs().max().item() for d in delta.values())
        assert largest == pytest.approx(method.lr, rel=1e-3)
        state = method.round(state, at.reach(number))
        at.commit()
    steps = {n: t.item() for n, t in at.desks["zoo"].memory["moments"].items() if n.startswith("step/")}
    assert set(steps.values()) == {1}
    assert {n.removeprefix("step/") for n in steps} == set(state.tensors)


@pytest.mark.parametrize("method", [IA3(), LayerNorm(), Lora(rank=2, dora=True)], ids=["ia3", "layernorm", "dora"])
def test_decay_pulls_towards_the_base(llama: Resident, rated: Silos, method: Averaging) -> None:
    """One SGD step with decay .5 at lr .1 beside one without: t - .05 * (t - base's); of A and B t - .05 * t."""
    method = replace(method, lr=0.1, optimizer="sgd", local_steps=1, batch_size=2, schedule="constant")
    body = asked(llama, rated, method)
    base = body.tensors
    moved = replace(body, tensors={n: t + 0.1 for n, t in base.items()})
    plain, decayed = (
        train(silos_of(llama, rated)[0], replace(moved, method=replace(method, weight_decay=decay))) for decay in (0.0, 0.5)
    )
    for n, t in moved.tensors.items():
        factor = ".lora_A." in n or ".lora_B." in n
        pull = -0.05 * t if factor else torch.full_like(t, -0.05 * 0.1)
        assert torch.allclose(decayed.delta[n] - plain.delta[n], pull, atol=1e-6), n


def test_dropout_is_set_and_used(llama: Resident, written: Silos) -> None:
    method = Lora(rank=2, dropout=0.5, local_steps=2, batch_size=2)
    assert method.config(llama).lora_dropout == 0.5
    body = asked(llama, written, method)
    with_it, without = (
        train(silos_of(llama, written)[0], replace(body, method=replace(method, dropout=d))) for d in (0.5, 0.0)
    )
    assert any((d - without.delta[n]).abs().max() > 1e-4 for n, d in with_it.delta.items())


def test_pooled_does_the_work_of_all_silos() -> None:
    method = Lora(local_steps=3, server_optimizer="adam", server_lr=0.1, aggregate="median", lr=0.5, rank=4)
    pooled = method.pooled(4)
    assert isinstance(pooled, Lora)
    assert (pooled.local_steps, pooled.optimizer_state) == (12, "keep")
    assert (pooled.server_optimizer, pooled.server_rate, pooled.aggregate) == ("none", 1.0, "mean")
    assert (pooled.lr, pooled.rank) == (0.5, 4)
    assert sum(map(len, (pooled.lrs(n, 3) for n in (1, 2, 3)))) == 4 * 9


def test_probe_is_one_step_of_the_same_work() -> None:
    body = Train(Lora(local_steps=3), one(1.0), (0.3, 0.2, 0.1))
    small = probe(body)
    assert small is not None
    assert small.lrs == (0.3,)
    assert small.method.local_steps == 1
    assert probe(replace(body, method=Lora(dropout=0.1))) is None, "dropout draws its masks silo by silo"


@pytest.mark.parametrize("name", sorted(n for n, kind in find.methods().items() if issubclass(kind, Averaging)))
def test_settings_of_one_silo_are_settings_of_the_method(name: str) -> None:
    kind = find.methods()[name]
    assert {"lr", "local_steps", "batch_size"} <= per_silo(kind)
    assert not {"aggregate", "server_lr", "schedule", "max_delta_norm"} & per_silo(kind)
    assert ("rank" in per_silo(kind)) == (name == "lora")
    assert ("virtual_tokens" in per_silo(kind)) == (name in ("prefix", "soft_prompt"))


def test_what_check_lists_is_what_a_silo_sends(any_resident: Resident, rated: Silos) -> None:
    for method in METHODS.values():
        small = replace(method, local_steps=1)
        sent = train(silos_of(any_resident, rated)[0], asked(any_resident, rated, small))
        listed = small.example(any_resident, 2)
        assert wire.leaving(listed) == wire.leaving(sent)
        assert abs(len(wire.pack(listed)) - len(wire.pack(sent))) <= 8  # a digit more or less of the loss, padded


def test_an_export_leaves_the_resident_as_it_was(causal: Resident, tmp_path: Any) -> None:
    """The next row of an experiment must not begin where this one ended."""
    for kind, method in METHODS.items():
        tuned = method.put_on(causal, 0)
        before = tuned.tensors()
        tensors = {n: t + 1 for n, t in before.items()}
        method.export(causal, tensors, tmp_path / kind)
        assert all(torch.equal(t, before[n]) for n, t in method.put_on(causal, 0).tensors().items())


def test_a_pooled_silo_has_nothing_that_is_meant_for_many() -> None:
    """A bound that suits a silo would reject the pooled one, whose steps are as many as all silos take."""
    pooled = Prefix(max_delta_norm=0.5, prox=0.1, aggregate="median", server_optimizer="adam").pooled(4)
    assert pooled == Prefix(local_steps=32, optimizer_state="keep")


def test_the_norm_of_large_numbers_is_finite() -> None:
    assert norm({"a": torch.full((2,), 3e30), "b": torch.tensor([4e30])}) == pytest.approx((18 + 16) ** 0.5 * 1e30)
