"""Prompt tuning (Lester et al. 2021): trained embeddings in front of the text, the base untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedtailor import ahead
from fedtailor.methods.averaging import Averaging, Count, Positive
from fedtailor.methods.virtual import begins, instruction, room
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned

WEIGHT = "prompt_encoder.default.embedding.weight"


@dataclass(frozen=True)
class SoftPrompt(Averaging):
    """Trains virtual_tokens x embedding width numbers."""

    PER_SILO = frozenset({"virtual_tokens"})

    lr: Positive = 3e-2
    virtual_tokens: Count = 16
    init_text: str = "Read the text and answer the question about it as well as you can, in a few words."
    """Start from the embeddings of this text, repeated or cut to length; empty: from noise, which learns slowly."""

    def config(self, resident: Resident) -> Any:
        if resident.kind == "vision":
            return ahead.Places("embeddings", self.virtual_tokens)
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=resident.task or "FEATURE_EXTRACTION",  # PEFT's class for encoder-decoders asks for a renamed method
            num_virtual_tokens=room(self.virtual_tokens, resident),
        )

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        dice = torch.Generator().manual_seed(seed % 2**63)
        tensors = tuned.tensors()
        if resident.kind == "vision":  # there is no text that it could start from
            noise = {n: 0.02 * torch.randn(t.shape, generator=dice) for n, t in tensors.items() if n.startswith("added.")}
            return {**tensors, **noise}
        tensors[WEIGHT] = 0.02 * torch.randn(tensors[WEIGHT].shape, generator=dice)
        if self.init_text:
            ids = torch.tensor(begins(self.init_text, self.virtual_tokens, resident))
            tensors[WEIGHT] = resident.module.get_input_embeddings().weight[ids.to(resident.device)].float().cpu()
        return tensors

    def __post_init__(self) -> None:
        instruction(self.init_text)
