"""What our own hooks put in front, for bases without a key/value cache to hold it, or whose cache PEFT fills wrongly.

    Keys(attentions, P)    P trained keys and values in front of those of every named attention (prefix-tuning)
    Places(embeddings, P)  P trained embeddings behind the class token of a picture (visual prompts, Jia et al. 2022)

Both take no place of the context, and count for no position: in an attention with a position bias, theirs is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor.added import IN_FRONT, VIRTUAL, Added, Nothing, Plan, width

INPUTS = {"key": ("k_proj", "key", "k"), "value": ("v_proj", "value", "v")}  # what the layers that make them are called


@dataclass(frozen=True)
class Keys(Nothing):
    attentions: tuple[str, ...]
    count: int  # virtual tokens

    def attach(self, module: Any) -> Added:
        added = Added(LOAD_KEYS, VIRTUAL)
        added.unused = set(self.attentions)
        for name in self.attentions:
            layer = module.get_submodule(name)
            made = [getattr(layer, next(n for n in names if hasattr(layer, n))) for names in INPUTS.values()]
            sizes = zip(INPUTS, made, strict=True)
            keys = [added.own(f"{name}.{part}", one.weight, self.count, width(one)) for part, one in sizes]

            def put(key: Tensor, value: Tensor, mask: Any, bias: Any, own: list[str] = keys, name: str = name) -> Any:
                added.unused.discard(name)
                return in_front(key, value, mask, bias, *(getattr(added, n) for n in own))

            layer.__dict__[IN_FRONT] = put
            added.hooks.append(_Mark(layer))
        return added


def captured(module: Any, names: tuple[str, ...], run: Callable[[], Any]) -> dict[str, Tensor]:
    """The keys and values that these attentions make of the first row while `run()` runs, as the tensors of `Keys`."""
    found: dict[str, Tensor] = {}
    layers = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():

        def put(key: Tensor, value: Tensor, mask: Any, bias: Any, name: str = name) -> Any:
            for part, t in (("key", key), ("value", value)):  # (B, H, T, D)
                own = f"{name}.{part}".replace(".", "/")
                found[f"added.{own}"] = t[0].transpose(0, 1).flatten(1).float().cpu()
            return key, value, mask, bias

        layer.__dict__[IN_FRONT] = put
    try:
        run()
    finally:
        for layer in layers.values():
            del layer.__dict__[IN_FRONT]
    return found


class _Mark:
    """Taken off like a hook."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def remove(self) -> None:
        self.layer.__dict__.pop(IN_FRONT, None)


def in_front(key: Tensor, value: Tensor, mask: Any, bias: Any, keys: Tensor, values: Tensor) -> tuple[Any, Any, Any, Any]:
    """key, value (B, H, T, D), mask and bias (B or 1, H or 1, Q, T), keys and values (P, H * D) -> all with P + T."""
    rows, heads, _, size = key.shape
    count = keys.shape[0]

    def wide(t: Tensor, like: Tensor) -> Tensor:
        return t.view(count, heads, size).transpose(0, 1).expand(rows, -1, -1, -1).to(like.dtype)

    def filled(t: Any, number: int) -> Any:
        return t if t is None else torch.cat([torch.full_like(t[..., :1], number).expand(*t.shape[:-1], count), t], dim=-1)

    seen = mask is not None and mask.dtype == torch.bool  # True lets a query see; of a float mask 0 does
    key, value = torch.cat([wide(keys, key), key], dim=2), torch.cat([wide(values, value), value], dim=2)
    return key, value, filled(mask, int(seen)), filled(bias, 0)


@dataclass(frozen=True)
class Places(Nothing):
    embeddings: str
    count: int

    def attach(self, module: Any) -> Added:
        added = Added(LOAD_PLACES, VIRTUAL, self.count)
        layer, size = module.get_submodule(self.embeddings), int(module.config.hidden_size)
        key = added.own(f"{self.embeddings}.places", next(layer.parameters()), self.count, size)

        def behind_the_first(h: Tensor) -> Tensor:
            own = getattr(added, key).expand(h.shape[0], -1, -1).to(h.dtype)
            return torch.cat([h[:, :1], own, h[:, 1:]], dim=1)

        added.on(layer, behind_the_first)
        return added


def attentions(plan: Plan) -> tuple[str, ...]:
    """The innermost attention layers that make keys and values, by name."""
    found = [name for name, kind in plan.items() if "attention" in kind.lower()]
    return tuple(n for n in found if all(any(f"{n}.{part}" in plan for part in names) for names in INPUTS.values()))


LOAD = '''"""Puts what was learnt on a base that transformers has loaded: model = load(model, folder)."""

import torch
from safetensors.torch import load_file
'''
LOAD_KEYS = f'''{LOAD}from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


def load(model, folder):
    tensors = load_file(f"{{folder}}/added.safetensors")
    for name in {{name.rpartition("/")[0] for name in tensors}}:
        layer = model.get_submodule(name.replace("/", "."))
        layer.in_front = [tensors[f"{{name}}/{{part}}"] for part in ("key", "value")]
    AttentionInterface.register("in_front", attention)
    AttentionMaskInterface.register("in_front", mask)
    model.set_attn_implementation("in_front")
    return model


def mask(*args, **kwargs):  # always built: a skipped one would be taken for that of the text's own keys
    return sdpa_mask(*args, **{{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}})


def attention(module, query, key, value, mask, position_bias=None, **more):
    if hasattr(module, "in_front"):
        rows, heads, _, size = key.shape
        count = module.in_front[0].shape[0]
        wide = [t.to(key).view(count, heads, size).transpose(0, 1).expand(rows, -1, -1, -1) for t in module.in_front]
        key, value = torch.cat([wide[0], key], dim=2), torch.cat([wide[1], value], dim=2)
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[..., :1]).expand(*mask.shape[:-1], count), mask], dim=-1)
        if position_bias is not None:
            none = torch.zeros_like(position_bias[..., :1]).expand(*position_bias.shape[:-1], count)
            position_bias = torch.cat([none, position_bias], dim=-1)
    return sdpa_attention_forward(module, query, key, value, mask, position_bias=position_bias, **more)
'''
LOAD_PLACES = f'''{LOAD}

def load(model, folder):
    for name, own in load_file(f"{{folder}}/added.safetensors").items():
        layer = model.get_submodule(name.rpartition("/")[0].replace("/", "."))

        def behind_the_first(_, __, h, own=own):
            return torch.cat([h[:, :1], own.to(h).expand(len(h), -1, -1), h[:, 1:]], dim=1)

        layer.register_forward_hook(behind_the_first)
    return model
'''
