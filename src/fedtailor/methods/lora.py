"""LoRA (Hu et al. 2022): a trained low-rank change B @ A on chosen weights; A and B averaged apart (FedIT).

The mean of products is not the product of means, so averaging A and B apart is inexact by the spread between silos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from fedtailor.methods.averaging import Averaging, Count, Positive
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned


@dataclass(frozen=True)
class Lora(Averaging):
    """Trains rank * (in + out) numbers per chosen weight, in fp32."""

    PER_SILO = frozenset({"rank"})  # a silo of lower rank trains the first rows of A and columns of B

    lr: Positive = 2e-3
    rank: Count = 8
    scale: Positive = 2.0  # alpha / rank, so that the strength of the change does not depend on a silo's rank
    targets: tuple[str, ...] = ()  # names of the weights; empty: PEFT's choice for the architecture (query and value)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # above 0: plain step only

    def config(self, resident: Resident) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            task_type="FEATURE_EXTRACTION" if resident.classifier else "CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.scale * self.rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.targets) or None,
            fan_in_fan_out=resident.module.config.model_type == "gpt2",
        )

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
