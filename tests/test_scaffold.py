"""SCAFFOLD (Karimireddy et al. 2020): each gradient is corrected by what the silo's own usually lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import SiloError, UserError
from fedtailor.experiment import load
from fedtailor.faults import Faults
from fedtailor.methods import scaffold
from fedtailor.methods.averaging import Averaging, Train, Trained, train, train_many
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident
from fedtailor.tuned import Tensors

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
PLAIN = Prefix(virtual_tokens=4, lr=0.1, local_steps=1, batch_size=6, optimizer="sgd", clip=0.0, schedule="constant")
METHOD = replace(PLAIN, scaffold=True)


def asked(base: Resident, method: Averaging, control: Tensors | None = None, number: int = 1) -> Train:
    tensors = method.initial(base, method.put_on(base, 2), 1)
    blank = {n: torch.zeros_like(t) for n, t in tensors.items()} if method.scaffold else {}
    return Train(method, tensors, method.lrs(1, 1), control=blank if control is None else control, number=number,
                 heard={"zoo": number - 1} if number > 1 else {})  # fmt: skip


def test_one_step_by_hand(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    """SGD without clipping: delta = -lr * (g + c - c_i), and c_i becomes g."""
    silo = Silo("zoo", rated["zoo"], {"base": llama}, 3)
    plain = train(silo, asked(llama, PLAIN))
    (name,) = plain.delta
    gradient = plain.delta[name] / -0.1
    first = train(silo, asked(llama, METHOD))
    assert torch.equal(first.delta[name], plain.delta[name]), "no correction before anything is known"
    assert torch.allclose(first.control[name] * first.weight, gradient, atol=1e-6)
    assert torch.allclose(scaffold.variate("zoo", silo.memory, {"zoo": 1})[name], gradient, atol=1e-6)
    assert scaffold.variate("zoo", silo.memory, {}) == {}, "not heard: it does not count"
    c = torch.full_like(gradient, 0.01)
    second = train(silo, asked(llama, METHOD, {name: c}, 2))
    assert torch.allclose(second.delta[name], -0.1 * c, atol=1e-6), "g - c_i is nothing the second time"
    assert torch.allclose(second.control[name], torch.zeros_like(c), atol=1e-6)


def test_the_servers_variate_is_the_mean_of_the_silos(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    engine = InProcess(rated, {"base": llama}, rounds=2)
    state = METHOD.begin(engine.reach(0))
    assert state.silos == 3
    engine.commit()
    state = METHOD.round(state, engine.reach(1, ["cafe", "zoo"]))
    engine.commit()
    (name,) = state.control
    mine = [engine.desks[silo].memory["sent"]["control"][name] for silo in ("cafe", "zoo")]
    assert state.heard == {"cafe": 1, "zoo": 1}
    assert torch.allclose(state.control[name], (mine[0] + mine[1]) / 3, atol=1e-6), "the third counts with nothing yet"
    assert engine.desks["shop"].memory == {}


def test_a_cohort_corrects_each_silo_by_its_own(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    dice = torch.Generator().manual_seed(0)
    body = asked(llama, METHOD)
    (name,) = body.tensors
    shape = body.tensors[name].shape
    memories: dict[str, dict[str, Any]] = {
        silo: {"control": {name: 0.01 * torch.randn(shape, generator=dice)}} for silo in rated
    }
    one = [train(Silo(s, d, {"base": llama}, 3, dict(memories[s])), body) for s, d in rated.items()]
    many = train_many([Silo(s, d, {"base": llama}, 3, dict(memories[s])) for s, d in rated.items()], body)
    for mine, other in zip(one, many, strict=True):
        assert isinstance(other, Trained)
        assert torch.allclose(mine.delta[name], other.delta[name], atol=1e-5)
        assert torch.allclose(mine.control[name], other.control[name], atol=1e-5)


def test_a_silo_of_lower_rank_is_refused(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    """Where it does not train, it would count as 0, and the mean would be too small."""
    method = Lora(rank=4, scaffold=True, local_steps=2, batch_size=2)
    silo = Silo("zoo", replace(rated["zoo"], settings={"rank": 1}), {"base": llama}, 3)
    with pytest.raises(SiloError, match=r"\[silo\.zoo\] sets fewer numbers than \[method\] trains"):
        train(silo, asked(llama, method))
    train(Silo("zoo", replace(rated["zoo"], settings={"lr": 1e-3}), {"base": llama}, 3), asked(llama, method))
    for sets, said in ((["silo.shop.rank=2"], r"\[silo.shop\] rank = 2 sets fewer"), (["silo.shop.rank=8"], "")):
        sets = ["method.name=lora", "method.scaffold=true", *sets]
        if said:
            with pytest.raises(UserError, match=said):
                load(TINY, sets)
        else:
            load(TINY, sets)


def test_the_variate_is_the_mean_over_the_steps(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    """The paper's option II, for plain SGD: c_i - c + (x - y) / (K lr), K steps from x to y."""
    method = replace(METHOD, local_steps=3, batch_size=2)
    silo = Silo("zoo", rated["zoo"], {"base": llama}, 3)
    first = train(silo, asked(llama, method))
    (name,) = first.delta
    mine = -first.delta[name] / 0.3
    assert torch.allclose(scaffold.variate("zoo", silo.memory, {"zoo": 1})[name], mine, atol=1e-6)
    c = torch.full_like(mine, 0.01)
    second = train(silo, asked(llama, method, {name: c}, 2))
    assert torch.allclose(silo.memory["sent"]["control"][name], mine - c - second.delta[name] / 0.3, atol=1e-6)
    one = train(Silo("zoo", rated["zoo"], {"base": llama}, 3), asked(llama, replace(METHOD, batch_size=2)))
    assert (one.delta[name] / -0.1 - mine).abs().max() > 1e-4, "the steps' gradients differ"


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        replace(METHOD, aggregate="median"),
        replace(METHOD, weigh="held"),
        Lora(rank=2, scaffold=True, local_steps=2, batch_size=2),
        Lora(rank=2, scaffold=True, local_steps=2, batch_size=2, combine="alternate"),
    ],
    ids=["total", "median", "held", "lora", "alternate"],
)
@pytest.mark.parametrize(
    "faults", [Faults(), Faults(dropout=0.4), Faults(attackers=("shop",), attack="nan")], ids=["none", "lost", "rejected"]
)
def test_the_servers_variate_stays_the_mean(
    llama: Resident, rated: Mapping[str, SiloData], method: Averaging, faults: Faults
) -> None:
    """Of the silos' own, whatever became of replies, of whatever weight, from whichever part of the silos."""
    data = {**rated, "shop": replace(rated["shop"], train=rated["shop"].train[:2])}
    engine = InProcess(data, {"base": llama}, rounds=5, faults=faults)
    state = method.begin(engine.reach(0))
    engine.commit()
    for number in range(1, 6):
        state = method.round(state, engine.reach(number, None if number % 2 else ["cafe", "shop"]))
        engine.commit()
    lost = {silo for silo, desk in engine.desks.items() if state.heard.get(silo) != desk.memory["sent"]["round"]}
    assert bool(lost) == bool(engine.rejected)
    assert set(state.control) == set(state.tensors)
    for name, c in state.control.items():
        mine = [scaffold.variate(silo, desk.memory, state.heard) for silo, desk in engine.desks.items()]
        mean = sum(own.get(name, torch.zeros_like(c)) for own in mine) / 3
        assert torch.allclose(c, mean, atol=1e-5 * max(1.0, c.abs().max().item())), name
        assert c.abs().max() > 0


def test_the_other_factors_variates_are_remembered(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    """B in odd rounds, A in even ones: the third begins with what the first found."""
    method = Lora(rank=2, scaffold=True, local_steps=1, batch_size=2, combine="alternate")
    engine = InProcess(rated, {"base": llama}, rounds=3)
    state = method.begin(engine.reach(0))
    engine.commit()
    states = []
    for number in (1, 2):
        state = method.round(state, engine.reach(number))
        engine.commit()
        states.append(state)
    third = method.asked(state, engine.reach(3))
    assert set(third.control) == {n for n in state.tensors if ".lora_B." in n}
    for n, c in third.control.items():
        assert torch.equal(c, states[0].control[n])
        assert c.abs().max() > 0
    for name, desk in engine.desks.items():
        assert set(scaffold.variate(name, desk.memory, state.heard)) == set(state.tensors)


def test_control_variates_that_were_not_asked_are_rejected(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    body = asked(llama, METHOD)
    reply = train(Silo("zoo", rated["zoo"], {"base": llama}, 3), body)
    assert reply.problem(body) is None
    for wrong in ({}, {"x": torch.zeros(1)}, {n: c[:1] for n, c in reply.control.items()}):
        assert replace(reply, control=wrong).problem(body) == "control variates differ from those asked"
    assert replace(reply, control={n: c * torch.nan for n, c in reply.control.items()}).problem(body) is not None


def test_the_centralized_baseline_has_none() -> None:
    pooled = METHOD.pooled(4)
    assert not pooled.scaffold
    assert pooled.local_steps == pytest.approx(4)
