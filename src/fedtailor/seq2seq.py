"""Encoder-decoder bases: the encoder reads the prompt, the decoder says the answer.

Rows are padded on the right: what is behind a row's end is masked in the encoder and lies in the decoder's future.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.tuned import IGNORED, Batch, Tuned


class EncoderDecoder(Tuned):
    """Virtual tokens are put in front of the encoder's text."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_ids: Tensor,
        encoded: Tensor | None = None,
        cache: Any = None,
        writing: bool = False,
    ) -> tuple[Tensor, Any, Tensor]:
        """Logits of every place of the decoder (B, K, V), its cache where it is `writing`, and the encoder's states.

        With `encoded` the encoder does not run again; with `cache`, `decoder_ids` are what comes after it.
        """
        from transformers.modeling_outputs import BaseModelOutput

        rows, text = input_ids.shape[0], {"input_ids": input_ids}
        if self.shift:
            ones = torch.ones((), dtype=attention_mask.dtype, device=attention_mask.device).expand(rows, self.shift)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
        if encoded is not None:
            text = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}  # type: ignore[dict-item]
        elif self.shift:
            embedded = self.base.get_input_embeddings()(input_ids)
            prompt = self.inner.get_prompt(rows).to(embedded.dtype)  # type: ignore[operator]
            text = {"inputs_embeds": torch.cat([prompt, embedded], dim=1)}
        out = self.base(
            **text, attention_mask=attention_mask, decoder_input_ids=decoder_ids, past_key_values=cache, use_cache=writing
        )
        return out.logits, out.past_key_values, out.encoder_last_hidden_state

    def logits(self, tensors: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        return self.using(tensors, batch.input_ids, batch.attention_mask, batch.decoder_ids)[0]  # type: ignore[no-any-return]

    def reading(
        self, tensors: Mapping[str, Tensor] | None, batch: Batch, context: int
    ) -> tuple[Callable[[Tensor | None], Tensor], list[int]]:
        rows, encoded, cache = batch.input_ids.shape[0], None, None

        def read(ids: Tensor | None) -> Tensor:
            nonlocal encoded, cache
            if ids is None:
                ids = torch.full((rows, 1), start(self.base), device=batch.input_ids.device)
            found, cache, encoded = self.using(
                tensors, batch.input_ids, batch.attention_mask, ids, encoded, cache, True
            )
            return found[:, -1]  # type: ignore[no-any-return]

        return read, [context - 1] * rows


def start(module: Any) -> int:
    """What the decoder reads before the answer's first token."""
    for config in (module.generation_config, module.config):
        if (found := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(found)
    return int(module.config.pad_token_id)


def batch(items: Sequence[Any], pad_id: int, start_id: int) -> Batch:
    """Right-padded, on the CPU; labels are the answers, and the decoder reads each one place later."""
    width, keep = max(len(i.prompt) for i in items), max(len(i.answer) for i in items)
    ids, labels = torch.full((len(items), width), pad_id), torch.full((len(items), keep), IGNORED)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    for i, item in enumerate(items):
        ids[i, : len(item.prompt)] = torch.tensor(item.prompt)
        mask[i, : len(item.prompt)] = 1
        labels[i, : len(item.answer)] = torch.tensor(item.answer)
    first = torch.full((len(items), min(keep, 1)), start_id)
    told = torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad_id)], dim=1)
    return Batch(ids, mask, torch.zeros_like(ids), labels, decoder_ids=told)
