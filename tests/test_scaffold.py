"""SCAFFOLD (Karimireddy et al. 2020): each gradient is corrected by what the silo's own usually lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.methods.averaging import Averaging, Train, Trained, train, train_many
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident
from fedtailor.tuned import Tensors

PLAIN = Prefix(virtual_tokens=4, lr=0.1, local_steps=1, batch_size=6, optimizer="sgd", clip=0.0, schedule="constant")
METHOD = replace(PLAIN, scaffold=True)


def asked(base: Resident, method: Averaging, control: Tensors | None = None) -> Train:
    tensors = method.initial(base, method.put_on(base, 2), 1)
    blank = {n: torch.zeros_like(t) for n, t in tensors.items()} if method.scaffold else {}
    return Train(method, tensors, method.lrs(1, 1), control=blank if control is None else control)


def test_one_step_by_hand(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    """SGD without clipping: delta = -lr * (g + c - c_i), and c_i becomes g."""
    silo = Silo("zoo", rated["zoo"], {"base": llama}, 3)
    plain = train(silo, asked(llama, PLAIN))
    (name,) = plain.delta
    gradient = plain.delta[name] / -0.1
    first = train(silo, asked(llama, METHOD))
    assert torch.equal(first.delta[name], plain.delta[name]), "no correction before anything is known"
    assert torch.allclose(first.control[name], gradient, atol=1e-6)
    assert torch.allclose(silo.memory["control"][name], gradient, atol=1e-6)
    c = torch.full_like(gradient, 0.01)
    second = train(silo, asked(llama, METHOD, {name: c}))
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
    mine = [engine.desks[silo].memory["control"][name] for silo in ("cafe", "zoo")]
    assert torch.allclose(state.control[name], (mine[0] + mine[1]) / 3, atol=1e-6), "the third counts with nothing yet"
    assert engine.desks["shop"].memory == {}


def test_a_cohort_corrects_each_silo_by_its_own(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    dice = torch.Generator().manual_seed(0)
    body = asked(llama, METHOD)
    (name,) = body.tensors
    memories = {silo: {"control": {name: 0.01 * torch.randn(body.tensors[name].shape, generator=dice)}} for silo in rated}
    one = [train(Silo(s, d, {"base": llama}, 3, dict(memories[s])), body) for s, d in rated.items()]
    many = train_many([Silo(s, d, {"base": llama}, 3, dict(memories[s])) for s, d in rated.items()], body)
    for mine, other in zip(one, many, strict=True):
        assert isinstance(other, Trained)
        assert torch.allclose(mine.delta[name], other.delta[name], atol=1e-5)
        assert torch.allclose(mine.control[name], other.control[name], atol=1e-5)


def test_a_silo_of_lower_rank_corrects_its_corner(llama: Resident, rated: Mapping[str, SiloData]) -> None:
    method = Lora(rank=4, scaffold=True, local_steps=2, batch_size=2)
    silo = Silo("zoo", replace(rated["zoo"], settings={"rank": 1}), {"base": llama}, 3)
    body = asked(llama, method)
    for _ in range(2):
        reply = train(silo, body)
        assert reply.problem(body) is None
    for name, kept in silo.memory["control"].items():
        assert kept.shape[0 if ".lora_A." in name else 1] == 1


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
