"""A resident base model with trainable tensors on it: the one module that training, scoring and export call.

The tensors live outside the module. Every call passes them in (`torch.func.functional_call`), so one frozen base serves
any number of silos, and `vmap` over stacked tensors trains many silos in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fedtailor.added import IN_FRONT, Added

Tensors = dict[str, Tensor]

ATTENTION = "cohort"
HEAD = ("head.weight", "head.bias")  # of a classifier
IGNORED = -100  # the label of a position that carries no loss
NONE = torch.empty(0)  # what a batch of this kind has not; a tensor like the others, so that `vmap` takes it


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask, always built: deciding by its values whether it may be skipped is what `vmap` cannot do."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """With what `ahead.Keys` has put in front of this layer's own keys and values."""
    if (put := module.__dict__.get(IN_FRONT)) is not None:
        key, value, mask, more["position_bias"] = put(key, value, mask, more.get("position_bias"))
    return sdpa_attention_forward(module, query, key, value, mask, **more)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _whole_mask)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left, so that answers are aligned right and logits are made for the last places only; those of an
    encoder-decoder are padded on the right.

    B rows, T places, K label places (causal model) or none (classifier). Under a cohort each has a silo axis in front.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 where there is a token
    position_ids: Tensor  # (B, T) int64, counted from the row's first token
    labels: Tensor  # causal: (B, K) token ids of the last K places; classifier: (B,) classes; IGNORED carries no loss
    pixels: Tensor = NONE  # vision, in place of the first three: (B, channels, height, width) uint8
    decoder_ids: Tensor = NONE  # encoder-decoder: (B, K), what the decoder has read before each label

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Tuned(nn.Module):
    """`inner` is the base itself, or a PEFT model around it; `head` is the classifier of an encoder, else None; `added` is
    what our own hooks put on the base, else None."""

    def __init__(self, inner: nn.Module, *, head: nn.Linear | None = None, added: Added | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.head = head
        self.added = added
        self.alone, self.tried = "", False  # why silos cannot train on it in one pass, once that was tried
        self.peft = hasattr(inner, "peft_config")
        kind = inner.active_peft_config.peft_type.value if self.peft else ""  # type: ignore[union-attr]
        self.prefixed = kind == "PREFIX_TUNING"
        self.prompted = kind in ("PROMPT_TUNING", "P_TUNING")  # virtual tokens are embeddings, read like any token
        # places of the context that virtual tokens take in front of every row
        self.shift = int(inner.active_peft_config.num_virtual_tokens) if self.prefixed or self.prompted else 0  # type: ignore[union-attr,arg-type]
        self.eval()  # the base's own dropout stays off: the pass is deterministic, and equal in a cohort

    @property
    def base(self) -> Any:
        return self.inner.get_base_model() if self.peft else self.inner  # type: ignore[operator]

    def names(self) -> tuple[str, ...]:
        """The trainable tensors, by the name they have in every body and file."""
        if self.added is not None:
            trainable = {f"added.{n}": p for n, p in self.added.named_parameters()}
        elif not self.peft:
            trainable = dict(self.inner.named_parameters())  # full: every weight; the module itself stays frozen
        else:
            trainable = {n: p for n, p in self.inner.named_parameters() if p.requires_grad}
        return (*trainable, *(() if self.head is None else HEAD))

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
        shift, text = self.shift, {"input_ids": input_ids}
        if shift:
            ones = torch.ones((), dtype=attention_mask.dtype, device=attention_mask.device).expand(rows, shift)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
        places = position_ids + shift
        if shift and cache is None:
            prompt = self.inner.get_prompt(rows)  # type: ignore[operator]
            if self.prefixed:
                cache = prompt
            else:  # (B, P, D) in front of the rows' own embeddings, at places 0..P-1
                embedded = self.base.get_input_embeddings()(input_ids)
                text = {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], dim=1)}
                first = torch.arange(shift, dtype=places.dtype, device=places.device).expand(rows, shift)
                places = torch.cat([first, places], dim=1)
        common = {**text, "attention_mask": attention_mask, "position_ids": places}
        if self.head is None:
            # no cache to read and none to fill in training: use_cache only where generation asks for it (keep == 1)
            out = self.base(**common, past_key_values=cache, use_cache=keep == 1, logits_to_keep=keep)
            return out.logits, out.past_key_values
        hidden = self.base(**common, past_key_values=cache).last_hidden_state  # (B, T, D)
        hidden = hidden[:, hidden.shape[1] - input_ids.shape[1] :]  # without the places of a soft prompt
        weights = attention_mask[:, shift:, None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)  # mean over tokens: BERT's own pooler trains badly
        return self.head(pooled.to(self.head.weight.dtype)), None

    def logits(self, tensors: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        """Those that `batch.labels` are about: (B, K, V); for a classifier (B, classes)."""
        keep = 2 if self.head is not None else batch.labels.shape[-1] + 1
        found, _ = self.using(tensors, batch.input_ids, batch.attention_mask, batch.position_ids, keep)
        # the logits at place t are about the token at t + 1
        return found if self.head is not None else found[:, :-1]  # type: ignore[no-any-return]

    def reading(
        self, tensors: Mapping[str, Tensor] | None, batch: Batch, context: int
    ) -> tuple[Callable[[Tensor | None], Tensor], list[int]]:
        """For writing on: `read(None)` gives the logits (B, V) after the rows, `read(ids)`, ids (B, 1), those after one more
        token each; and after how many tokens each row's context is full."""
        first, mask, places, cache = batch.input_ids, batch.attention_mask, batch.position_ids, None
        last = context - self.shift - 1  # the last place that the model can read

        def read(ids: Tensor | None) -> Tensor:
            nonlocal mask, places, cache
            if ids is not None:
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                places = (places[:, -1:] + 1).clamp(max=last)
            found, cache = self.using(tensors, first if ids is None else ids, mask, places, 1, cache)
            return found[:, -1]  # type: ignore[no-any-return]

        return read, [last - place for place in places[:, -1].tolist()]

    def losses(self, tensors: Mapping[str, Tensor] | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood in nats (fp32) and the number of places it is summed over."""
        logits = self.logits(tensors, batch)
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


def joined(tensors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Tensors:
    """What is trained, with what stays as it is: tensors of their own, or more of one along an axis ("cat0/<name>")."""
    whole = {n: t for n, t in fixed.items() if not n.startswith("cat")} | dict(tensors)
    for n, t in fixed.items():
        if n.startswith("cat"):
            axis, _, name = n.removeprefix("cat").partition("/")
            whole[name] = torch.cat([whole[name], t], dim=int(axis))
    return whole


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Of all numbers together, in fp64: the square of a large fp32 is none."""
    return math.sqrt(math.fsum(t.double().square().sum().item() for t in tensors.values()))


def _short(name: str) -> str:
    return name.removeprefix("inner.")


def _long(name: str) -> str:
    return name if name in HEAD or name.startswith("added.") else f"inner.{name}"


def stack(batches: list[Batch], pad_id: int) -> Batch:
    """Batches of equal row count, one per silo, as one with a silo axis: (S, B, T), padded to one length."""
    values = {"input_ids": pad_id, "decoder_ids": pad_id, "labels": IGNORED}
    right = batches[0].decoder_ids.dim() == 2

    def together(name: str) -> Tensor:
        some = [getattr(b, name) for b in batches]
        if some[0].dim() == 2:  # (B, T); classes and pixels are of one size
            width = max(t.shape[1] for t in some)
            gaps = [(0, width - t.shape[1]) if right else (width - t.shape[1], 0) for t in some]
            some = [nn.functional.pad(t, gap, value=values.get(name, 0)) for t, gap in zip(some, gaps, strict=True)]
        return torch.stack(some)

    return Batch(*map(together, Batch.__dataclass_fields__))
