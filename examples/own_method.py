"""A method and an aggregator of your own, in one file outside the package, found by name:

    fedtailor run experiments/tiny.toml --set method.name=examples.own_method:LastLayers \\
        --set method.aggregate=examples.own_method:trimmed

(run from the folder that holds examples/)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from fedtailor.methods.averaging import Averaging


@dataclass(frozen=True)
class LastLayers(Averaging):
    """LoRA on the last `layers` layers only."""

    lr: float = 2e-3
    layers: int = 1
    rank: int = 4

    def config(self, resident: Any) -> Any:
        count = resident.module.config.num_hidden_layers
        return LoraConfig(task_type="CAUSAL_LM", r=self.rank, layers_to_transform=list(range(count - self.layers, count)))


def trimmed(replies: Sequence[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    """Coordinate-wise mean without the largest and the smallest value (Yin et al. 2018); needs three replies."""
    stacked = {name: torch.stack([delta[name] for delta, _ in replies]).sort(dim=0).values for name in replies[0][0]}
    return {name: values[1:-1].mean(dim=0) for name, values in stacked.items()}
