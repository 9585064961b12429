"""Prefix-tuning (Li & Liang 2021): trained keys and values in front of every layer's own, the base untouched.

Flat: the keys and values themselves are the tensors. Projected: a small MLP makes them (the paper's
reparametrisation); then *all* its tensors travel, and the export is collapsed to the flat prefix it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedtailor import ahead
from fedtailor.errors import UserError
from fedtailor.exporting import save_adapter
from fedtailor.methods.averaging import Averaging, Count, Positive, labels_of
from fedtailor.methods.targets import KINDS
from fedtailor.methods.virtual import begins, instruction, room
from fedtailor.models import Resident
from fedtailor.tuned import HEAD, Tensors, Tuned

WEIGHT = "prompt_encoder.default.embedding.weight"
FIRST, LAST = "prompt_encoder.default.transform.0", "prompt_encoder.default.transform.2"


@dataclass(frozen=True)
class Prefix(Averaging):
    """Trains virtual_tokens x layers x 2 x key/value width numbers (flat), in fp32."""

    PER_SILO = frozenset({"virtual_tokens"})

    lr: Positive = 1e-2
    virtual_tokens: Count = 16
    init_text: str = "Read the text and answer the question about it as well as you can, in a few words."
    """Start from the keys and values of this text, repeated or cut to length; empty: from noise, which learns slowly."""
    projection: bool = False
    projection_size: Annotated[int, Field(ge=1)] = 256  # hidden width of the MLP

    def config(self, resident: Resident) -> Any:
        if resident.kind in ("vision", "seq2seq"):  # no cache to hold a prefix, or one that PEFT fills with few layers' own
            if self.projection:
                what = KINDS[resident.kind]
                raise UserError(f"[method] projection: {what} takes a flat prefix; set method.projection = false")
            return ahead.Keys(ahead.attentions(resident.plan), self.virtual_tokens)
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=resident.task,
            num_virtual_tokens=room(self.virtual_tokens, resident),
            prefix_projection=self.projection,
            encoder_hidden_size=self.projection_size,
        )

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        dice = torch.Generator().manual_seed(seed % 2**63)
        blank = tuned.tensors()
        tensors = {n: 0.02 * torch.randn(t.shape, generator=dice) for n, t in blank.items() if n not in HEAD}
        head = {n: t for n, t in blank.items() if n in HEAD}
        if not self.init_text or resident.classifier:
            return tensors | head
        if resident.kind == "seq2seq":
            return self._read(resident)
        wanted = self._activations(resident)
        if not self.projection:
            return {WEIGHT: wanted}
        # the MLP's last layer is solved so that it gives exactly these activations for the random first layer
        tensors[WEIGHT] = torch.randn(tensors[WEIGHT].shape, generator=dice)
        inside = torch.tanh(tensors[WEIGHT] @ tensors[f"{FIRST}.weight"].T + tensors[f"{FIRST}.bias"])  # (P, H)
        middle = wanted.mean(0)
        tensors[f"{LAST}.bias"] = middle
        tensors[f"{LAST}.weight"] = (torch.linalg.pinv(inside) @ (wanted - middle)).T.contiguous()
        return tensors

    def _read(self, resident: Resident) -> Tensors:
        """What an encoder-decoder's attentions make of the text, read by both halves."""
        ids = torch.tensor([begins(self.init_text, self.virtual_tokens, resident)], device=resident.device)
        bare = resident.tuned()
        with torch.no_grad():
            return ahead.captured(
                resident.module, ahead.attentions(resident.plan), lambda: bare.using(None, ids, torch.ones_like(ids), ids)
            )

    def _activations(self, resident: Resident) -> Tensor:
        """(virtual_tokens, layers * 2 * width): the text's keys and values as a flat prefix."""
        from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

        ids = begins(self.init_text, self.virtual_tokens, resident)
        bare = resident.tuned()
        with torch.no_grad():
            some = torch.tensor([ids], device=resident.device)
            _, cache = bare.using(
                None, some, torch.ones_like(some), torch.arange(len(ids), device=some.device)[None], 1
            )
        return prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=len(ids)).float().cpu()

    def flat(self, resident: Resident, tensors: Mapping[str, Tensor]) -> tuple[Prefix, Tensors]:
        """The same prefix without its MLP."""
        if not self.projection:
            return self, dict(tensors)
        inside = torch.tanh(tensors[WEIGHT] @ tensors[f"{FIRST}.weight"].T + tensors[f"{FIRST}.bias"])
        wide = inside @ tensors[f"{LAST}.weight"].T + tensors[f"{LAST}.bias"]
        rest = {n: t for n, t in tensors.items() if n in HEAD}
        return replace(self, projection=False), {WEIGHT: wide, **rest}

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        method, collapsed = self.flat(resident, tensors)
        save_adapter(method.put_on(resident, labels_of(tensors)), collapsed, folder)

    def __post_init__(self) -> None:
        instruction(self.init_text)
