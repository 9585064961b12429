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

import torch

from fedtailor import training
from fedtailor.errors import SiloError, UserError, suggest
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.methods.targets import chosen, usual
from fedtailor.models import Resident, one_line
from fedtailor.tuned import NONE, Batch, Tuned

# torch.func.vmap has no rule for what these compute with; of the last four, one pass was seen to give other numbers
ALONE = frozenset({"c3a", "fourierft", "frod", "loha", "oft", "randlora", "waveft"}) | frozenset(
    {"lily", "trainable_tokens", "unilora", "vblora"}
)
OURS = {"prefix_tuning": "prefix", "prompt_tuning": "soft_prompt", "p_tuning": "p_tuning"}


@dataclass(frozen=True)
class Peft(Averaging):
    """Starts where PEFT starts it. Kinds that have a method of their own here are better asked for by that."""

    lr: Positive = 2e-3
    type: str = "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def one_by_one(self) -> str:
        alone = self.type.lower() in ALONE
        return f"{self.type} is not to be computed under torch.func.vmap" if alone else super().one_by_one

    def alone_on(self, resident: Resident) -> str:
        """Why silos train one by one on this base; empty where they can in one pass."""
        return self.one_by_one or self.put_on(resident, 0).alone

    def put_on(self, resident: Resident, labels: int) -> Tuned:
        tuned = super().put_on(resident, labels)
        if not tuned.tried:  # once for each time that it is put on
            try:
                tuned.alone = self.one_by_one or _tried(tuned, resident)
            except Exception as error:  # whatever PEFT's code raises when it is used in another way than it was made for
                resident.tuned()
                kind, why = type(resident.module).__name__, "it has nothing to train by gradients"
                why = why if isinstance(error, SiloError) else one_line(error)
                said = f"[method] type = {self.type!r} cannot be trained on {kind}: {why}; choose another type"
                raise UserError(said) from error
            tuned.tried = True
        return tuned

    def config(self, resident: Resident) -> Any:
        import peft

        known = {
            kind.value.lower(): kind
            for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
            if not issubclass(made, peft.PromptLearningConfig)  # virtual tokens: prefix, soft_prompt, p_tuning are ours
        }
        if (ours := OURS.get(self.type.lower())) is not None:
            raise UserError(f"[method] type = {self.type!r}: a method of its own here; set method.name = {ours!r}")
        named = self.settings.get("target_modules")
        if isinstance(named, (list, tuple)):
            chosen(named, resident)
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


def _tried(tuned: Tuned, resident: Resident) -> str:
    """One gradient of made-up rows by the plain step, which may raise; and by the cohort step: why it is none, or ""."""
    row = _row(resident)
    tensors = {n: t.to(resident.device) for n, t in tuned.tensors().items()}
    plain, _, _ = training._plain(tuned, {n: t[None] for n, t in tensors.items()}, {}, [row], resident, None)
    if resident.quantized:
        return ""
    both = {n: torch.stack([t, t]) for n, t in tensors.items()}
    with torch.random.fork_rng():
        try:
            many, _, _ = training._cohort(tuned, both, {}, [row, row], resident, None)
        except (RuntimeError, NotImplementedError) as error:  # functorch's ways to say that it has no rule
            return f"torch.func.vmap has no rule for it: {one_line(error)}"
    for n, gradient in plain.items():
        if not torch.allclose(many[n], gradient.expand_as(many[n]), rtol=0.05, atol=0.05 * float(gradient.abs().max()) + 1e-6):
            return f"torch.func.vmap gives other gradients of {n}"
    return ""


def _row(resident: Resident) -> Batch:
    one = torch.zeros(1, 1, dtype=torch.long)
    ids, places = torch.tensor([[0, 1, 2]]), torch.arange(3)[None]
    if resident.look is not None:
        shape = resident.look.channels, resident.look.height, resident.look.width
        return Batch(NONE, NONE, NONE, one[0], torch.zeros(1, *shape, dtype=torch.uint8))
    labels = one[0] if resident.classifier else one
    return Batch(ids, torch.ones_like(ids), places, labels, decoder_ids=one if resident.kind == "seq2seq" else NONE)
