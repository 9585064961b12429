"""LayerNorm tuning (Zhao et al. 2024): only the scales, and where there are any the shifts, of normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedtailor import added
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.models import Resident


@dataclass(frozen=True)
class LayerNorm(Averaging):
    """Starts as the base."""

    lr: Positive = 5e-3

    def config(self, resident: Resident) -> Any:
        from peft import LNTuningConfig

        return LNTuningConfig(
            task_type=resident.task,
            target_modules=list(added.norms(resident.plan)),
        )
