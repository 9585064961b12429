"""A base is put back bit for bit, whatever PEFT did to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.before import Before
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.methods.peft import Peft
from fedtailor.models import Resident


def bits(base: Resident) -> dict[str, torch.Tensor]:
    base.tuned()
    return {n: t.clone() for n, t in base.module.state_dict().items()}


def same(base: Resident, before: dict[str, torch.Tensor]) -> bool:
    now = bits(base)
    return set(now) == set(before) and all(torch.equal(t, now[n]) for n, t in before.items())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changes_the_base_is_refused(llama: Resident, start: str) -> None:
    before = bits(llama)
    with pytest.raises(UserError, match=r"LORA: these settings change the base's own weights .* first model.layers.0"):
        Peft(settings={"init_lora_weights": start, "r": 4}).put_on(llama, 0)
    assert same(llama, before)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("c3a", {"block_size": 16}), ("fourierft", {"n_frequency": 10}), ("psoft", {"r": 8}), ("lora", {"bias": "all"})],
)
def test_it_comes_off(llama: Resident, kind: str, settings: dict[str, Any]) -> None:
    before = bits(llama)
    Peft(type=kind, settings=settings).put_on(llama, 0)
    assert same(llama, before)


@pytest.mark.parametrize("kind", ["poly", "shira", "psoft", "tinylora"])
def test_what_cannot_be_trained_is_told_in_a_line(llama: Resident, kind: str) -> None:
    before = bits(llama)
    with pytest.raises(UserError) as told:
        Peft(type=kind).put_on(llama, 0)
    assert "\n" not in str(told.value)
    assert same(llama, before)


def test_writes_and_replacements_are_undone() -> None:
    layer = torch.nn.Linear(2, 2)
    old = {n: t.clone() for n, t in layer.state_dict().items()}
    before = Before(layer)
    with before.watched():
        layer.weight.data -= 1
        layer.bias.data = layer.bias.data + 1
    assert before.changed() in ("weight", "bias")
    before.put_back()
    assert before.changed() == ""
    assert all(torch.equal(t, old[n]) for n, t in layer.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "settings"), [("c3a", {"block_size": 16}), ("fourierft", {"n_frequency": 10})]
)
def test_silos_train_one_by_one_where_one_pass_cannot(
    llama: Resident, rated: dict[str, SiloData], kind: str, settings: dict[str, Any]
) -> None:
    method = Peft(type=kind, settings=settings, local_steps=2, batch_size=2)
    assert method.alone_on(llama)
    ends = []
    for cohort in (1, 3):
        engine = InProcess(rated, {"base": llama}, rounds=1, cohort=cohort)
        state = method.round(method.begin(engine.reach(0)), engine.reach(1))
        ends.append(wire.pack(state))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("kind", "ours"), [("prefix_tuning", "prefix"), ("prompt_tuning", "soft_prompt")])
def test_virtual_tokens_are_methods_of_ours(llama: Resident, kind: str, ours: str) -> None:
    with pytest.raises(UserError, match=f"set method.name = '{ours}'"):
        Peft(type=kind).put_on(llama, 0)
