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
    feedforward: tuple[str, ...] = ()  # layers whose input is scaled instead; empty, and no targets: PEFT's choice

    def config(self, resident: Resident) -> Any:
        from peft import IA3Config
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as INSIDE
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as ALL

        mine = chosen(self.feedforward, resident)
        targets = chosen(self.targets, resident)
        feedforward: list[str] | None = mine or []
        if targets is None:
            kind = resident.module.config.model_type
            known = usual(resident, "key", "value", "feedforward") or ALL.get(kind)
            inside = usual(resident, "feedforward") or INSIDE.get(kind)
            if mine and known is not None:
                targets = [name for name in known if name not in (inside or [])]
            elif not mine:
                targets, feedforward = known, inside
        if targets is not None and mine:  # PEFT wants them among the targets
            targets = [*targets, *(name for name in mine if name not in targets)]

        return IA3Config(
            task_type=resident.task,
            target_modules=targets,
            feedforward_modules=feedforward,
            fan_in_fan_out=resident.module.config.model_type == "gpt2",
        )
