"""A resident base model with trainable tensors on it: the one module that training, scoring and export call.

The tensors live outside the module. Every call passes them in (`torch.func.functional_call`), so one frozen base serves
any number of silos, and `vmap` over stacked tensors trains many silos in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Tensors = dict[str, Tensor]

ATTENTION = "cohort"
IGNORED = -100  # the label of a position that carries no loss


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask, always built: deciding by its values whether it may be skipped is what `vmap` cannot do."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, _whole_mask)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left, so that answers are aligned right and logits are made for the last places only.

    B rows, T places, K label places (causal model) or none (classifier). Under a cohort each has a silo axis in front.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 where there is a token
    position_ids: Tensor  # (B, T) int64, counted from the row's first token
    labels: Tensor  # causal: (B, K) token ids of the last K places; classifier: (B,) classes; IGNORED carries no loss

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Tuned(nn.Module):
    """`inner` is the base itself, or a PEFT model around it; `head` is the classifier of an encoder, else None."""

    def __init__(self, inner: nn.Module, *, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.head = head
        self.peft = hasattr(inner, "peft_config")
        self.prefixed = self.peft and inner.active_peft_config.peft_type == "PREFIX_TUNING"  # type: ignore[union-attr]
        # places of the context that the prefix takes in front of every row
        self.shift = int(inner.active_peft_config.num_virtual_tokens) if self.prefixed else 0  # type: ignore[union-attr,arg-type]
        self.eval()  # the base's own dropout stays off: the pass is deterministic, and equal in a cohort

    @property
    def base(self) -> Any:
        return self.inner.get_base_model() if self.peft else self.inner  # type: ignore[operator]

    def names(self) -> tuple[str, ...]:
        """The trainable tensors, by the name they have in every body and file."""
        if not self.peft:
            trainable = dict(self.inner.named_parameters())  # full: every weight; the module itself stays frozen
        else:
            trainable = {n: p for n, p in self.inner.named_parameters() if p.requires_grad}
        return (*trainable, *(() if self.head is None else ("head.weight", "head.bias")))

    def tensors(self) -> Tensors:
        """Fresh fp32 copies, on the CPU, of the trainable tensors as they stand in the module."""
        parameters = {_short(name): p for name, p in self.named_parameters()}
        return {name: parameters[name].detach().to("cpu", torch.float32, copy=True) for name in self.names()}

    def using(self, tensors: Mapping[str, Tensor] | None, *args: Any) -> Any:
        """`forward(*args)` with these tensors in place of the module's own (None: as they stand)."""
        if tensors is None:
            return self(*args)
        dtypes = self.__dict__.setdefault("_dtypes", {_short(n): p.dtype for n, p in self.named_parameters()})
        # full fine-tuning keeps fp32 master tensors and computes in the base's dtype; adapters are fp32 on both sides
        device = self.base.device
        placed = {_long(name): tensor.to(device, dtypes[name]) for name, tensor in tensors.items()}
        return torch.func.functional_call(self, placed, args)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, keep: int, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """Logits of the last `keep` places, (B, keep, V), and the cache; for a classifier (B, classes) and None.

        Without `cache` the prefix, if there is one, is put in front. With it, `attention_mask` covers past and present
        and `position_ids` count from the row's first token as always.
        """
        rows = input_ids.shape[0]
        shift = self.shift
        if self.prefixed:
            ones = torch.ones((), dtype=attention_mask.dtype, device=attention_mask.device).expand(rows, shift)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
            if cache is None:
                cache = self.inner.get_prompt(rows)  # type: ignore[operator]
        common = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids + shift}
        if self.head is None:
            # no cache to read and none to fill in training: use_cache only where generation asks for it (keep == 1)
            out = self.base(**common, past_key_values=cache, use_cache=keep == 1, logits_to_keep=keep)
            return out.logits, out.past_key_values
        hidden = self.base(**common, past_key_values=cache).last_hidden_state  # (B, T, D)
        weights = attention_mask[:, shift:, None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)  # mean over tokens: BERT's own pooler trains badly
        return self.head(pooled.to(self.head.weight.dtype)), None

    def losses(self, tensors: Mapping[str, Tensor] | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood in nats (fp32) and the number of places it is summed over."""
        keep = 2 if self.head is not None else batch.labels.shape[-1] + 1
        logits, _ = self.using(tensors, batch.input_ids, batch.attention_mask, batch.position_ids, keep)
        if self.head is None:
            logits = logits[:, :-1]  # the logits at place t are about the token at t + 1
        nll = nn.functional.cross_entropy(
            logits.float().flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return nll, (batch.labels != IGNORED).sum()

    @contextmanager
    def dropping(self, seed: int) -> Iterator[None]:
        """The adapter's own dropout on, its masks from `seed` alone; the caller's random state is untouched."""
        layers = [m for n, m in self.inner.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in n]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()


def _short(name: str) -> str:
    return name.removeprefix("inner.")


def _long(name: str) -> str:
    return name if name.startswith("head.") else f"inner.{name}"


def stack(batches: list[Batch], pad_id: int) -> Batch:
    """Batches of equal row count, one per silo, as one with a silo axis: (S, B, T), padded on the left to one length."""
    width = max(b.input_ids.shape[1] for b in batches)
    keep = max(b.labels.shape[-1] for b in batches)
    causal = batches[0].labels.dim() == 2

    def left(t: Tensor, size: int, value: int) -> Tensor:
        return nn.functional.pad(t, (size - t.shape[1], 0), value=value)

    even = [
        replace(
            b,
            input_ids=left(b.input_ids, width, pad_id),
            attention_mask=left(b.attention_mask, width, 0),
            position_ids=left(b.position_ids, width, 0),
            labels=left(b.labels, keep, IGNORED) if causal else b.labels,
        )
        for b in batches
    ]
    return Batch(*(torch.stack([getattr(b, n) for b in even]) for n in Batch.__dataclass_fields__))
