"""LoRA (Hu et al. 2022): a trained low-rank change B @ A on chosen weights; five ways to combine what silos learnt.

    mean       A and B averaged apart (FedIT, Zhang et al. 2024): the product of means is not the mean of products
    exact      as mean, and what it misses, mean(BA) - mean(B)mean(A), is kept beside it (FedEx-LoRA, Singhal et al. 2025)
    frozen_a   only B is trained, so its mean is exact (FFA-LoRA, Sun et al. 2024)
    alternate  B in odd rounds, A in even ones: each mean is exact (RoLoRA, Chen et al. 2024)
    svd        the mean of products, cut to `rank` (FlexLoRA, Bai et al. 2024): for silos of different rank

Each round tells its gap: the Frobenius norm of (mean of the silos' products - what was applied) over that of the mean's change.
With DoRA none is told: the weights are then no sum with a product, and no combination is exact. What `exact` keeps grows by up
to silos x rank a round, at most to the layer's own rank, and goes down each round: few rounds, or `svd`, keep it small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor import lowrank
from fedtailor.core import Ask
from fedtailor.errors import UserError
from fedtailor.exporting import save_adapter
from fedtailor.methods import scaffold
from fedtailor.methods.averaging import Averaging, Count, Positive, State, Trained, labels_of, mean_loss, train
from fedtailor.methods.targets import chosen, fitting, usual
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned


@dataclass(frozen=True)
class Lora(Averaging):
    """Trains rank * (in + out) numbers per chosen weight, in fp32."""

    PER_SILO = frozenset({"rank"})  # a silo of lower rank trains the first rows of A and columns of B

    lr: Positive = 5e-3
    rank: Count = 8
    scale: Positive = 2.0  # alpha / rank, so that the strength of the change does not depend on a silo's rank
    rslora: bool = False  # the change is scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023)
    dora: bool = False  # the length of each weight's rows is trained apart (DoRA, Liu et al. 2024)
    targets: tuple[str, ...] = ()  # names of the weights; empty: PEFT's choice for the architecture (query and value)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # above 0: plain step only
    combine: Literal["mean", "exact", "frozen_a", "alternate", "svd"] = "mean"
    gap: bool = True  # tell the gap of a mean, too: then the server sees each silo's change, not their sum alone

    def config(self, resident: Resident) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            task_type=resident.task,
            r=self.rank,
            lora_alpha=self.factor * self.rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.dora,
            target_modules=chosen(self.targets, resident) or usual(resident),
            fan_in_fan_out=resident.module.config.model_type == "gpt2",
        )

    def put_on(self, resident: Resident, labels: int) -> Tuned:
        tuned = super().put_on(resident, labels)
        tensors = tuned.tensors()
        if looked := next((n for n in tensors if ".lora_embedding_" in n), None):
            name = looked.partition(".lora_embedding_")[0].rpartition(".")[2]
            raise UserError(f"[method] targets: {name!r} is an embedding; choose linear layers, or method peft, type = 'lora'")
        fitting(self.rank, {n: tuple(t.shape) for n, t in tensors.items()})
        return tuned

    @property
    def factor(self) -> float:
        """Of the product B @ A, the same for every silo."""
        return self.scale * self.rank**0.5 if self.rslora else self.scale

    def mine(self, settings: Mapping[str, Any]) -> Averaging:
        if not settings:
            return self
        # the factor is that of the federation's rank, whatever this silo's is
        return replace(self, **{**settings, "rslora": False, "scale": self.factor})

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        dice = torch.Generator().manual_seed(seed % 2**63)
        tensors = tuned.tensors()
        for name, t in tensors.items():
            if ".lora_A." in name:  # PEFT's own start: uniform within 1 / sqrt(in); B is zero, so the base is unchanged
                tensors[name] = (torch.rand(t.shape, generator=dice) * 2 - 1) / t.shape[1] ** 0.5
            elif ".lora_B." in name:
                tensors[name] = torch.zeros_like(t)
        return tensors

    @property
    def dropping(self) -> bool:
        return self.dropout > 0

    def pooled(self, silos: int) -> Averaging:
        alone = replace(self, combine="frozen_a" if self.combine == "frozen_a" else "mean", gap=False)
        return super(Lora, alone).pooled(silos)

    def split(self, state: State, number: int) -> tuple[Tensors, Tensors]:
        still = {"frozen_a": ".lora_A.", "alternate": ".lora_A." if number % 2 else ".lora_B."}.get(self.combine)
        if still is None:
            return state.tensors, state.fixed
        fixed = {n: t for n, t in state.tensors.items() if still in n}
        return {n: t for n, t in state.tensors.items() if n not in fixed}, {**state.fixed, **fixed}

    def round(self, state: State, ask: Ask) -> State:
        if self.aggregate != "mean" or (not self.gap and self.combine in ("mean", "frozen_a", "alternate")):
            return super().round(state, ask)
        body = self.asked(state, ask)
        heard = list(ask(train, body))
        replies = [reply.body for reply in heard]
        weights = [reply.weight for reply in replies]
        delta = _mean([reply.delta for reply in replies], weights)
        shift = scaffold.shift(heard)
        after = self.stepped(state, ask, body, delta, {"train_loss": mean_loss(replies)}, shift)
        tensors, fixed = dict(after.tensors), dict(after.fixed)
        missed = changed = 0.0
        for a, b in pairs(state.tensors):
            before = lowrank.product(state.tensors[b], state.tensors[a])
            ideal = lowrank.mean([lowrank.product(*learnt(state, reply, b, a)) for reply in replies], weights)
            if self.combine == "exact":
                fixed |= self._kept(fixed, a, b, ideal - lowrank.product(tensors[b], tensors[a]), ideal)
            elif self.combine == "svd":
                tensors |= self._cut(a, b, ideal, state.tensors[a])
            applied = _whole(tensors, fixed, a, b) - _beside(state.fixed, a, b)
            missed += (ideal - applied).norm() ** 2
            changed += (ideal - before).norm() ** 2
        told = {"gap": (missed / changed) ** 0.5 if changed else 0.0} if len(replies) > 1 and not self.dora else {}
        return replace(after, tensors=tensors, fixed=fixed, notes={**after.notes, **told})

    def _kept(self, fixed: Tensors, a: str, b: str, missed: lowrank.Product, ideal: lowrank.Product) -> Tensors:
        """What the means miss, on top of what they missed before, as wider factors: "cat0/A", "cat1/B". Less than fp32's rounding
        of the whole change (2^-24, 6e-8 of it) is noise, and would be most of what is kept."""
        before = _beside(fixed, a, b)
        whole = (missed + before).thin(least=6e-8 * (ideal + before).norm())
        return {f"cat0/{a}": whole.right.float(), f"cat1/{b}": whole.left.float()}

    def _cut(self, a: str, b: str, ideal: lowrank.Product, start: Tensor) -> Tensors:
        """The nearest factors of `rank`. Where there is less to keep, A's other rows stay, so that they can be trained."""
        kept = ideal.thin(self.rank)
        count = kept.right.shape[0]
        right = torch.cat([kept.right.float(), start[count:]])
        left = torch.cat([kept.left.float(), torch.zeros(kept.left.shape[0], self.rank - count)], dim=1)
        return {a: right, b: left}

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """As PEFT loads it; what `exact` keeps beside the means makes some layers' rank a higher one."""
        ranks = {_layer(a): tensors[a].shape[0] for a, _ in pairs(tensors)}
        config = self.config(resident)
        config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != self.rank}
        config.alpha_pattern = {layer: self.factor * rank for layer, rank in config.rank_pattern.items()}
        save_adapter(resident.tuned(config, labels_of(tensors)), tensors, folder)

    def __post_init__(self) -> None:
        exact = self.combine in ("exact", "svd")
        if self.combine == "exact" and self.dropout:
            raise ValueError("combine = 'exact' keeps a part of the weights beside A, and dropout would hit it; set dropout = 0")
        if self.combine == "svd" and self.scaffold:
            raise ValueError("combine = 'svd' turns the factors each round, so control variates fit no more; scaffold = false")
        if exact and self.dora:
            raise ValueError(f"dora scales what A and B make, so combine = {self.combine!r} would not be exact; use mean")
        servers = (self.server_optimizer, self.server_rate, self.server_schedule, self.aggregate)
        if exact and servers != ("none", 1, "constant", "mean"):
            what = "server_optimizer must be none, server_lr 1, server_schedule constant, aggregate mean"
            raise ValueError(f"combine = {self.combine!r} applies the mean itself: {what}")
        if self.combine == "svd" and self.optimizer_state == "keep":
            raise ValueError("combine = 'svd' turns the factors each round, so moments kept from before fit no more; use reset")


def pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of A and B of each layer."""
    return [(n, n.replace(".lora_A.", ".lora_B.")) for n in tensors if ".lora_A." in n and not n.startswith("cat")]


def learnt(state: State, reply: Trained, *names: str) -> list[Tensor]:
    """These tensors as a silo left them; what it did not train is as it was."""
    return [state.tensors[n] + reply.delta[n] if n in reply.delta else state.tensors[n] for n in names]


def _mean(some: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """In silo order, in fp32: as `ask.total` adds."""
    whole: Tensors = {}
    for tensors, weight in zip(some, weights, strict=True):
        for n, t in tensors.items():
            whole[n] = whole[n].add_(t, alpha=weight) if n in whole else t * weight
    return {n: t / sum(weights) for n, t in whole.items()}


def _whole(tensors: Tensors, fixed: Tensors, a: str, b: str) -> lowrank.Product:
    return lowrank.product(tensors[b], tensors[a]) + _beside(fixed, a, b)


def _beside(fixed: Tensors, a: str, b: str) -> lowrank.Product:
    """What `exact` has kept so far; nothing at first."""
    none = torch.zeros(0, 0)
    return lowrank.product(fixed.get(f"cat1/{b}", none), fixed.get(f"cat0/{a}", none))


def _layer(a: str) -> str:
    """A layer's name as PEFT's patterns know it."""
    return a.removeprefix("base_model.model.").partition(".lora_A.")[0]
