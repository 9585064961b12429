"""BitFit (Ben Zaken et al. 2022): only biases. What is trained is their change, so a layer without a bias (as in Llama)
has one like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedtailor import added, ahead
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.models import Resident


@dataclass(frozen=True)
class BitFit(Averaging):
    """Starts as the base: every change is 0."""

    lr: Positive = 5e-3

    def config(self, resident: Resident) -> Any:
        layers = added.linear(resident.plan)
        if resident.kind in ("vision", "seq2seq"):
            # what is added to all keys adds the same to each of a query's scores, and softmax takes it out again: with no
            # rotation between, its gradient is 0 but for rounding, which AdamW would make steps of
            layers = tuple(name for name in layers if name.rpartition(".")[2] not in ahead.INPUTS["key"])
        return added.Offsets(layers)
