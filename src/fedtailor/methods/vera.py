"""VeRA (Kopiczko et al. 2024): LoRA with random factors, the same for all layers and silos, of which two scales are trained.

The random factors come from `key` alone, so they never travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from fedtailor.methods.averaging import Averaging, Count, Positive
from fedtailor.methods.targets import chosen, usual
from fedtailor.models import Resident


@dataclass(frozen=True)
class Vera(Averaging):
    """Trains rank + out numbers per chosen weight. Starts as the base."""

    lr: Positive = 2e-2
    rank: Count = 64
    start: Positive = 0.1  # of the first scale; the second starts at 0
    key: Annotated[int, Field(ge=0)] = 0
    targets: tuple[str, ...] = ()  # names of the weights; empty: PEFT's choice for the architecture

    def config(self, resident: Resident) -> Any:
        from peft import VeraConfig

        return VeraConfig(
            task_type=resident.task,
            r=self.rank,
            d_initial=self.start,
            projection_prng_key=self.key,
            target_modules=chosen(self.targets, resident) or usual(resident),
            fan_in_fan_out=resident.module.config.model_type == "gpt2",
        )
