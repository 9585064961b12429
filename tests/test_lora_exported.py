"""LoRA as plain PEFT loads it, where two of its settings meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedtailor.data import SiloData
from fedtailor.methods.lora import Lora, pairs
from fedtailor.models import Resident
from test_lora_combine import IDS, SMALL, logits, ran


def test_the_wider_factors_of_exact_are_scaled_as_rslora_scales(
    llama: Resident, written: Mapping[str, SiloData], plain: Callable[[str], Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    method = Lora(**SMALL, combine="exact", rslora=True)
    served = method.serve(ran(llama, written, method))
    module = plain("llama")
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for a, b in pairs(served.tensors):
            assert served.tensors[a].shape[0] > method.rank
            weight = weights[a.removeprefix("base_model.model.").replace("lora_A.default.", "")]
            weight += 2.0 * 2**0.5 * served.tensors[b] @ served.tensors[a]  # scale * sqrt(rank), whatever rank it became
        expected = module(IDS).logits
        method.export(llama, served.tensors, tmp_path)
        theirs = PeftModel.from_pretrained(plain("llama"), tmp_path).eval()(IDS).logits
    assert torch.allclose(logits(llama, served), expected, atol=1e-4)
    assert torch.allclose(theirs, expected, atol=1e-4)
