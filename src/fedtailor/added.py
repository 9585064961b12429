"""What is put on a base by our own hooks, where PEFT has none: parameters of a module beside it, the base untouched.

    Offsets(names)         a trained vector added to the output of each named layer: the change of its bias
    Bottlenecks(names, w)  h + up(relu(down(h))) on the output of each named block
    Nothing()              only an encoder's head is trained

Parameters are named "<layer>/<part>" with "/" for every dot: a parameter's own name may hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

VIRTUAL = "virtual tokens are no change of weights"
IN_FRONT = "_in_front"  # what an attention layer's own keys and values are given to first: see `ahead.Keys`


class Added(nn.Module):
    """The parameters, and the hooks that use them. `torch.func.functional_call` puts others in their place."""

    def __init__(self, loader: str = "", why: str = "", places: int = 0) -> None:
        super().__init__()
        self.hooks: list[Any] = []
        self.loader = loader  # of the exported folder: the text of its load.py
        self.why = why  # it cannot be merged into the base's weights; "": it can
        self.places = places  # of the base's output that are trained ones, after the first
        self.unused: set[str] = set()  # layers that have not asked yet for what is put in front of them

    def own(self, name: str, like: Tensor, *shape: int) -> str:
        key = name.replace(".", "/")
        self.register_parameter(key, nn.Parameter(torch.zeros(shape, device=like.device), requires_grad=False))
        return key

    def on(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            changed = change(first).to(first.dtype)  # computed in fp32, as PEFT does with its adapters
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        self.hooks.append(layer.register_forward_hook(hook))

    def take_off(self) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Nothing:
    def attach(self, module: Any) -> Added:
        return Added()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Offsets(Nothing):
    layers: tuple[str, ...]

    def attach(self, module: Any) -> Added:
        added = Added(LOAD_HOOKS % OFFSETS)
        for name in self.layers:
            layer = module.get_submodule(name)
            key = added.own(name, layer.weight, width(layer))
            added.on(layer, lambda out, key=key: out + getattr(added, key))  # type: ignore[misc]
        return added


@dataclass(frozen=True)
class Bottlenecks(Nothing):
    blocks: tuple[str, ...]
    inside: int  # width of the bottleneck

    def attach(self, module: Any) -> Added:
        added = Added(LOAD_HOOKS % BOTTLENECKS, "bottlenecks are layers of their own")
        size, like = int(module.config.hidden_size), next(module.parameters())
        for name in self.blocks:
            shapes = {"down.weight": (self.inside, size), "down.bias": (self.inside,), "up.weight": (size, self.inside),
                      "up.bias": (size,)}  # fmt: skip
            keys = [added.own(f"{name}.{part}", like, *shape) for part, shape in shapes.items()]
            added.on(module.get_submodule(name), lambda h, keys=keys: bottleneck(h, *(getattr(added, k) for k in keys)))  # type: ignore[misc]
        return added


def bottleneck(h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """h (..., D), down (W, D), up (D, W)."""
    inside = nn.functional.linear(h.to(down.dtype), down, down_bias).relu()
    return h + nn.functional.linear(inside, up, up_bias)


def width(layer: Any) -> int:
    """Of a layer's output: a Linear keeps weights as (out, in), GPT-2's Conv1D as (in, out)."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[1])


Plan = Mapping[str, str]  # a base's modules before anything is put on it: name -> kind


def plan(module: nn.Module) -> Plan:
    """A quantized layer counts as the Linear that it stands for."""
    return {n: "Linear" if isinstance(m, nn.Linear) else type(m).__name__ for n, m in module.named_modules()}


def blocks(of: Plan) -> tuple[str, ...]:
    """The repeated layers of a transformer, by name: the entries of its longest outer lists of equal modules; of an
    encoder-decoder, those of each half."""
    lists: dict[str, list[str]] = {}
    for name, kind in of.items():
        above, _, last = name.rpartition(".")
        if last.isdigit():
            lists.setdefault(above, []).append(kind)
    equal = {n: len(kinds) for n, kinds in lists.items() if len(set(kinds)) == 1}
    outer = {n: count for n, count in equal.items() if not any(n.startswith(f"{other}.") for other in equal)}
    half = {n: "decoder" in n.split(".") for n in outer}
    longest = {side: max((c for n, c in outer.items() if half[n] == side), default=0) for side in (False, True)}
    return tuple(f"{n}.{i}" for n, count in outer.items() if count == longest[half[n]] for i in range(count))


def linear(of: Plan) -> tuple[str, ...]:
    """Every layer inside the blocks that multiplies by a matrix."""
    inside = tuple(f"{name}." for name in blocks(of))
    return tuple(name for name, kind in of.items() if name.startswith(inside) and kind in ("Linear", "Conv1D"))


def norms(of: Plan) -> tuple[str, ...]:
    """The names that normalisation layers have, without their place."""
    return tuple(sorted({name.rpartition(".")[2] for name, kind in of.items() if "norm" in kind.lower()}))


# The loaders of exported folders. added.safetensors holds "<layer>/<part>" with "/" for every dot, as in a Tuned's `added`
LOAD_HOOKS = '''"""Puts what was learnt on a base that transformers has loaded: model = load(model, folder)."""

import torch
from safetensors.torch import load_file


def load(model, folder):
    tensors = {name.replace("/", "."): t for name, t in load_file(f"{folder}/added.safetensors").items()}
%s
    return model


def put(layer, change):
    def hook(_, __, out):
        first = out[0] if isinstance(out, tuple) else out
        changed = change(first.float()).to(first.dtype)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    layer.register_forward_hook(hook)
'''
OFFSETS = '''    for name, offset in tensors.items():
        put(model.get_submodule(name), lambda out, offset=offset: out + offset.to(out.device))'''
BOTTLENECKS = '''    for name in sorted({name.removesuffix(".down.weight") for name in tensors if name.endswith(".down.weight")}):
        parts = ("down.weight", "down.bias", "up.weight", "up.bias")
        four = [tensors[f"{name}.{part}"].to(model.device) for part in parts]
        put(model.get_submodule(name), lambda h, four=four: h + torch.relu(h @ four[0].T + four[1]) @ four[2].T + four[3])'''
