"""Any adapter that PEFT knows: `type` names it, `settings` holds its settings, as in PEFT's own documentation.

    [method]
    name = "peft"
    type = "loha"
    settings = { r = 8, alpha = 16, target_modules = ["q_proj", "v_proj"] }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtailor.errors import UserError, suggest
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.methods.targets import usual
from fedtailor.models import Resident

ALONE = frozenset({"frod", "loha", "oft", "randlora"})  # torch.func.vmap has no rule for what these compute with


@dataclass(frozen=True)
class Peft(Averaging):
    """Starts where PEFT starts it. Kinds that have a method of their own here are better asked for by that."""

    lr: Positive = 2e-3
    type: str = "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def one_by_one(self) -> str:
        alone = self.type.lower() in ALONE
        return f"torch.func.vmap has no rule for what {self.type} computes with" if alone else super().one_by_one

    def config(self, resident: Resident) -> Any:
        import peft

        known = {
            kind.value.lower(): kind
            for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
            if not issubclass(made, peft.PromptLearningConfig)  # virtual tokens: prefix, soft_prompt, p_tuning are ours
        }
        if self.type.lower() not in known:
            raise UserError(f"[method] type = {self.type!r}: PEFT has no such adapter{suggest(self.type.lower(), known)}")
        kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[known[self.type.lower()]]
        try:
            return kind(task_type=resident.task, **{**_targets(kind, resident), **self.settings})
        except (TypeError, ValueError) as error:
            raise UserError(f"[method] settings of {self.type!r}: {error}") from error


def _targets(kind: Any, resident: Resident) -> dict[str, Any]:
    """Where PEFT itself has no choice for the architecture."""
    mine = usual(resident)
    return {"target_modules": mine} if mine and "target_modules" in kind.__dataclass_fields__ else {}
