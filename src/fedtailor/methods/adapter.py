"""Bottleneck adapters (Houlsby et al. 2019), one after each block as in Pfeiffer et al. 2021: h + up(relu(down(h)))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedtailor import added
from fedtailor.methods.averaging import Averaging, Count, Positive
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned


@dataclass(frozen=True)
class Adapter(Averaging):
    """Trains 2 * size * hidden + size + hidden numbers per block. Starts as the base: `up` is 0."""

    lr: Positive = 5e-3
    size: Count = 16  # width of the bottleneck

    def config(self, resident: Resident) -> Any:
        return added.Bottlenecks(added.blocks(resident.plan), self.size)

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        dice = torch.Generator().manual_seed(seed % 2**63)
        tensors = tuned.tensors()
        for name, t in tensors.items():
            if name.endswith("/down/weight"):
                tensors[name] = torch.randn(t.shape, generator=dice) / t.shape[1] ** 0.5
        return tensors
