"""(IA)3 (Liu et al. 2022): trained factors on keys, values and the feed-forward's inside; the fewest numbers of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.methods.targets import chosen, usual
from fedtailor.models import Resident


@dataclass(frozen=True)
class IA3(Averaging):
    """Starts as the base: every factor is 1."""

    lr: Positive = 3e-2
    targets: tuple[str, ...] = ()  # layers whose output is scaled; empty: PEFT's choice for the architecture
    feedforward: tuple[str, ...] = ()  # those of them whose input is scaled instead

    def config(self, resident: Resident) -> Any:
        from peft import IA3Config

        return IA3Config(
            task_type=resident.task,
            target_modules=chosen(self.targets, resident) or usual(resident, "key", "value", "feedforward"),
            feedforward_modules=chosen(self.feedforward, resident) or [] if self.targets else usual(resident, "feedforward"),
            fan_in_fan_out=resident.module.config.model_type == "gpt2",
        )
