"""A base as it was before other people's code went on it: its modules and its numbers, to be put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Before:
    """Takes no memory for numbers that nobody changes: what is replaced is held, and copied just before a write into it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = dict(module.named_modules())
        # children, parameters, buffers, hooks, and whatever else was set on the instance
        self.had = {n: {k: _copied(v) for k, v in m.__dict__.items()} for n, m in self.modules.items()}
        owned = [*module.named_parameters(), *module.named_buffers()]
        self.tensors: dict[str, tuple[Tensor, Tensor]] = {n: (t, t.data) for n, t in owned}
        self.written: dict[int, Tensor] = {}  # storage -> its bytes before the first write

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What writes into the base's numbers meanwhile can be undone."""
        with _Writes({_place(t) for _, t in self.tensors.values()}, self.written):
            yield

    def changed(self) -> str:
        """The first tensor that has other numbers now than before; "": none."""
        now: dict[str, dict[str, Any]] = {
            n: {**m.__dict__["_parameters"], **m.__dict__["_buffers"]} for n, m in self.modules.items()
        }
        for name, (_, data) in self.tensors.items():
            above, _, last = name.rpartition(".")
            found = now[above].get(last)
            before = self._bytes(data)
            if found is None or ((found.data is data or _place(found.data) == _place(data)) and before is None):
                continue  # taken out whole, which the adapter's own place for it answers for; or never touched
            if found.shape != data.shape or found.dtype != data.dtype or not torch.equal(found.data, _old(data, before)):
                return name
        return ""

    def put_back(self) -> None:
        for name, module in self.modules.items():
            module.__dict__.clear()
            module.__dict__.update({k: _copied(v) for k, v in self.had[name].items()})
        for tensor, data in self.tensors.values():
            before = self._bytes(data)
            if before is not None:
                with torch.no_grad():
                    data.copy_(_old(data, before))
            if _place(tensor.data) != _place(data):
                tensor.data = data
            tensor.requires_grad_(False)
        self.written.clear()

    def _bytes(self, data: Tensor) -> Tensor | None:
        return self.written.get(_place(data))


class _Writes(TorchDispatchMode):
    def __init__(self, places: set[int], written: dict[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places, self.written = places, written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    some = named.get(argument.name)
                    for one in some if isinstance(some, list | tuple) else [some]:
                        self._before(one)
        return func(*args, **(kwargs or {}))

    def _before(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and (place := _place(tensor)) in self.places and place not in self.written:
            self.written[place] = _whole(tensor).clone()


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All bytes of the storage that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _old(data: Tensor, before: Tensor | None) -> Tensor:
    """`data` as it was, seen through the bytes kept of its storage."""
    if before is None:
        return data
    seen = torch.empty(0, dtype=data.dtype, device=data.device)
    return seen.set_(before.untyped_storage(), data.storage_offset(), data.shape, data.stride())
