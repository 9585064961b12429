"""Full fine-tuning: every weight of the base, averaged (FedAvg). The resident base itself stays untouched.

Weights are trained in fp32 and used in the base's own dtype. Bytes per round are those of the whole model, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtailor.errors import UserError
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.models import Resident
from fedtailor.tuned import HEAD


@dataclass(frozen=True)
class Full(Averaging):
    lr: Positive = 1e-4

    @property
    def one_by_one(self) -> str:
        return "each silo in a pass would hold a copy of every weight, with its gradient and moments"

    def config(self, resident: Resident) -> Any:
        if resident.quantized:
            raise UserError("[method] full trains every weight, and those of a quantized base cannot be; choose lora, or another")
        return None

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` (an encoder or a vision model: `AutoModel`; an encoder-decoder:
        `AutoModelForSeq2SeqLM`) loads, in fp32 as trained."""
        from safetensors.torch import save_file
        from transformers import AutoConfig

        weights = {n: t for n, t in tensors.items() if n not in HEAD}
        buffers = {n: t for n, t in resident.module.state_dict().items() if n not in weights}
        tied = set(getattr(resident.module, "_tied_weights_keys", None) or ())
        whole = weights | {n: t for n, t in buffers.items() if n not in tied}
        resident.module.save_pretrained(folder, state_dict={n: t.contiguous() for n, t in whole.items()})
        resident.save_reader(folder)
        config = AutoConfig.from_pretrained(folder)
        config.dtype = torch.float32  # of the weights as saved; the base's own would round them at loading
        config.save_pretrained(folder)
        if head := {n: t for n, t in tensors.items() if n in HEAD}:
            save_file(head, folder / "head.safetensors")
