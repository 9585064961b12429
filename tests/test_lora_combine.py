"""How silos' low-rank changes are put together: by hand on 1 x 1 factors, then on models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor.core import Reply, Silo, Total
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.methods.averaging import Adapted, State, Train, Trained, train
from fedtailor.methods.lora import Lora, pairs
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, joined

A, B = "base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_B.default.weight"
IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])


class Told:
    """An Ask whose silos leave the factors that are given: (a, b) of one layer."""

    silos = ("one", "two")
    rounds = 10

    def __init__(self, *left: tuple[float, float], number: int = 1) -> None:
        self.left, self.round = left, number
        self.bodies: list[Train] = []

    def __call__(self, work: Any, body: Train, **_: Any) -> Iterator[Reply[Trained]]:
        self.bodies.append(body)
        for silo, (a, b) in zip(self.silos, self.left, strict=True):
            mine = {A: torch.tensor([[a]]), B: torch.tensor([[b]])}
            yield Reply(silo, Trained({n: mine[n] - t for n, t in body.tensors.items()}, 8.0, 1.0))

    def total(self, work: Any, body: Train, **_: Any) -> Total[Trained]:
        raise AssertionError("each reply is needed")


def begun(a: float = 1.0, b: float = 0.0) -> State:
    return State({A: torch.tensor([[a]]), B: torch.tensor([[b]])}, silos=2)


def applied(state: State) -> float:
    whole = joined(state.tensors, state.fixed)
    return float((whole[B] @ whole[A]).item())


# two silos leave (a, b) = (2, 1) and (0, 3): products 2 and 0, their mean 1; means a = 1, b = 2, their product 2
LEFT = ((2.0, 1.0), (0.0, 3.0))


def test_the_mean_by_hand() -> None:
    state = Lora(rank=1).round(begun(), Told(*LEFT))
    assert applied(state) == pytest.approx(2)
    assert state.notes["gap"] == pytest.approx(1)  # |1 - 2| / |1 - 0|


def test_the_exact_one_by_hand_and_over_rounds() -> None:
    method = Lora(rank=1, combine="exact")
    state = method.round(begun(), Told(*LEFT))
    assert applied(state) == pytest.approx(1)
    assert state.notes["gap"] < 1e-7
    assert state.tensors == begun(1.0, 2.0).tensors
    again = Told((1.0, 4.0), (3.0, 0.0), number=2)
    after = method.round(state, again)
    # from 2 * 1 the silos go to 4 and 0, mean 2; what was kept beside, -1, stays: 2 - 1
    assert applied(after) == pytest.approx(1)
    assert again.bodies[0].fixed.keys() == {f"cat0/{A}", f"cat1/{B}"}
    assert after.notes["gap"] < 1e-7


def test_svd_by_hand() -> None:
    state = Lora(rank=1, combine="svd").round(begun(), Told(*LEFT))
    assert applied(state) == pytest.approx(1)
    assert state.tensors[A].abs().item() == pytest.approx(1)
    assert state.notes["gap"] < 1e-7


def test_svd_of_nothing_can_still_be_trained() -> None:
    state = Lora(rank=1, combine="svd").round(begun(), Told((1.0, 0.0), (1.0, 0.0)))
    assert state.tensors == begun().tensors


@pytest.mark.parametrize(
    ("combine", "number", "sent"), [("frozen_a", 1, B), ("frozen_a", 2, B), ("alternate", 1, B), ("alternate", 2, A)]
)
def test_one_factor_at_a_time_by_hand(combine: Any, number: int, sent: str) -> None:
    told = Told((4.0, 1.0), (0.0, 3.0), number=number)
    state = Lora(rank=1, combine=combine).round(begun(1.0, 1.0), told)
    assert set(told.bodies[0].tensors) == {sent}
    assert set(told.bodies[0].fixed) == {A, B} - {sent}
    assert applied(state) == pytest.approx(2)  # mean b = 2 with a = 1, or mean a = 2 with b = 1
    assert state.notes["gap"] < 1e-7


def ran(base: Resident, data: Mapping[str, SiloData], method: Lora, rounds: int = 2) -> State:
    engine = InProcess(data, {"base": base}, rounds=rounds)
    state = method.begin(engine.reach(0))
    for number in range(1, rounds + 1):
        state = method.round(state, engine.reach(number))
        engine.commit()
    return state


def logits(base: Resident, served: Adapted) -> torch.Tensor:
    model = served.open({"base": base})
    with torch.no_grad():
        places = torch.arange(IDS.shape[1]).expand_as(IDS)
        found: torch.Tensor = model.tuned.using(model.tensors, IDS, torch.ones_like(IDS), places, IDS.shape[1])[0]
    return found


SMALL: dict[str, Any] = {"rank": 2, "lr": 0.05, "local_steps": 3, "batch_size": 2}


def test_what_is_kept_is_served_trained_on_and_exported(
    causal: Resident, written: Mapping[str, SiloData], plain: Callable[[str], Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    method = Lora(**SMALL, combine="exact")
    state = ran(causal, written, method)
    served = method.serve(state)
    module = plain(causal.module.config.model_type)
    weights = dict(module.named_parameters())
    whole = joined(state.tensors, state.fixed)
    with torch.no_grad():
        bare = module(IDS).logits
        for a, b in pairs(whole):
            change = 2.0 * whole[b] @ whole[a]
            weights[a.removeprefix("base_model.model.").replace("lora_A.default.", "")] += (
                change.T if module.config.model_type == "gpt2" else change
            )
        expected = module(IDS).logits
    assert (expected - bare).abs().max() > 1e-2
    assert torch.allclose(logits(causal, served), expected, atol=1e-4)
    without = Adapted(method, state.tensors)
    assert (logits(causal, without) - expected).abs().max() > 1e-4, "what is kept matters"
    # a silo trains on top of it: its loss before the first step is that of what is served
    silo = Silo("cafe", written["cafe"], {"base": causal}, 3)
    one = replace(method, local_steps=1)
    losses = [
        train(silo, Train(one, state.tensors, (0.01,), fixed)).loss for fixed in (state.fixed, {})
    ]
    assert losses[0] != pytest.approx(losses[1], abs=1e-6)
    method.export(causal, served.tensors, tmp_path)
    loaded = PeftModel.from_pretrained(plain(causal.module.config.model_type), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-4)


def test_a_cohort_trains_on_what_is_kept_like_one(llama: Resident, written: Mapping[str, SiloData]) -> None:
    method = Lora(**SMALL, combine="exact")
    states = []
    for cohort in (1, 3):
        engine = InProcess(written, {"base": llama}, rounds=2, cohort=cohort)
        state = ran(llama, written, method, rounds=1)
        states.append(method.round(state, engine.reach(2)))
    assert all(torch.allclose(t, states[1].tensors[n], atol=1e-5) for n, t in states[0].tensors.items())


def with_ranks(data: Mapping[str, SiloData], ranks: Sequence[int]) -> dict[str, SiloData]:
    return {n: replace(d, settings={"rank": r}) for (n, d), r in zip(data.items(), ranks, strict=True)}


@pytest.mark.parametrize("combine", ["mean", "exact", "frozen_a", "alternate", "svd"])
def test_silos_of_different_rank(llama: Resident, written: Mapping[str, SiloData], combine: Any) -> None:
    method = Lora(**{**SMALL, "rank": 4}, combine=combine)
    state = ran(llama, with_ranks(written, (1, 2, 4)), method, rounds=3)
    shapes = {n: t.shape for n, t in method.put_on(llama, 0).tensors().items()}
    assert {n: t.shape for n, t in state.tensors.items()} == shapes
    exact = combine in ("exact", "frozen_a", "alternate")
    assert (state.notes["gap"] < 1e-6) == exact


def test_the_product_counts_alike_whatever_a_silos_rank(llama: Resident, written: Mapping[str, SiloData]) -> None:
    """rsLoRA divides by the root of the federation's rank, not of the silo's."""
    method = Lora(**{**SMALL, "rank": 4}, rslora=True)
    assert method.factor == 4.0  # 2 * sqrt(4)
    lower = method.mine({"rank": 1})
    assert isinstance(lower, Lora)
    assert (lower.rank, lower.factor) == (1, 4.0)
    assert method.mine({}) == method
    assert method.config(llama).lora_alpha / 4 == lower.config(llama).lora_alpha


def test_the_gap_costs_the_sight_of_each_reply(llama: Resident, written: Mapping[str, SiloData]) -> None:
    with_gap, without = Lora(**SMALL), Lora(**SMALL, gap=False)
    one, other = ran(llama, written, with_gap), ran(llama, written, without)
    assert "gap" in one.notes
    assert "gap" not in other.notes
    assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"combine": "exact", "dora": True}, "would not be exact; use mean"),
        ({"combine": "svd", "server_optimizer": "adam"}, "server_optimizer must be none"),
        ({"combine": "exact", "aggregate": "median"}, "aggregate mean"),
        ({"combine": "svd", "optimizer_state": "keep"}, "use reset"),
        ({"combine": "svd", "scaffold": True}, "scaffold = false"),
        ({"combine": "exact", "dropout": 0.1}, "set dropout = 0"),
    ],
)
def test_what_would_not_be_exact_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Lora(**settings)


def test_dora_trains_lengths_too(causal: Resident, written: Mapping[str, SiloData]) -> None:
    begun_: Tensors = Lora(**SMALL, dora=True).begin(InProcess(written, {"base": causal}).reach(0)).tensors
    lengths = [n for n in begun_ if "magnitude" in n]
    assert len(lengths) == len(pairs(begun_)) > 0
    state = ran(causal, written, Lora(**SMALL, dora=True))
    assert all(not torch.equal(state.tensors[n], begun_[n]) for n in lengths)


def test_no_gap_is_told_where_weights_are_no_sum(llama: Resident, written: Mapping[str, SiloData]) -> None:
    assert "gap" not in ran(llama, written, Lora(**SMALL, dora=True, combine="frozen_a")).notes


@pytest.mark.parametrize("combine", ["mean", "exact", "frozen_a", "alternate", "svd"])
def test_a_pooled_silo_has_nothing_to_combine(combine: Any) -> None:
    pooled = Lora(combine=combine).pooled(3)
    assert (pooled.combine, pooled.optimizer_state, pooled.gap) == (
        "frozen_a" if combine == "frozen_a" else "mean", "keep", False,
    )  # fmt: skip


def test_one_silo_has_nothing_to_keep(llama: Resident, written: Mapping[str, SiloData]) -> None:
    """Its product is the mean: what is left is rounding, and not kept. Of three, no more than they made: 2 of 3 ranks a round."""
    alone = ran(llama, {"cafe": written["cafe"]}, Lora(**SMALL, combine="exact"))
    assert {t.numel() for t in alone.fixed.values()} == {0}
    one = InProcess(written, {"base": llama}, rounds=1)
    method = Lora(**SMALL, combine="exact")
    state = method.round(method.begin(one.reach(0)), one.reach(1))
    ranks = {t.shape[0] for n, t in state.fixed.items() if n.startswith("cat0/")}
    assert 0 < max(ranks) <= 3 * method.rank


def test_an_embedding_is_refused(llama: Resident) -> None:
    with pytest.raises(UserError, match=r"'embed_tokens' is an embedding; choose linear layers"):
        Lora(targets=("q_proj", "embed_tokens")).put_on(llama, 0)
