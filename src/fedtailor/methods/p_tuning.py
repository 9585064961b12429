"""P-tuning (Liu et al. 2021): embeddings in front of the text, made by a small network. All of the network travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from fedtailor.methods.averaging import Averaging, Count, Positive
from fedtailor.methods.virtual import room
from fedtailor.models import Resident
from fedtailor.tuned import HEAD, Tensors, Tuned


@dataclass(frozen=True)
class PTuning(Averaging):
    """The network: embedding (virtual_tokens, width), then three layers. It starts at the size of the base's embeddings."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "encoder", "seq2seq")

    lr: Positive = 1e-2
    virtual_tokens: Count = 16
    size: Annotated[int, Field(ge=1)] = 128  # hidden width of the network

    def config(self, resident: Resident) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type=resident.task or "FEATURE_EXTRACTION",  # PEFT's class for encoder-decoders asks for a renamed method
            num_virtual_tokens=room(self.virtual_tokens, resident),
            encoder_hidden_size=self.size,
        )

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        dice = torch.Generator().manual_seed(seed % 2**63)
        tensors = tuned.tensors()
        like = float(resident.module.get_input_embeddings().weight.float().std())
        for name in (n for n in tuned.names() if n not in HEAD):
            t = tensors[name]
            tensors[name] = torch.randn(t.shape, generator=dice) / t.shape[1] ** 0.5 if t.dim() == 2 else torch.zeros_like(t)
        last = max(n for n in tensors if n.endswith(".weight") and "mlp_head" in n)
        tensors[last] = tensors[last] * like
        return tensors
