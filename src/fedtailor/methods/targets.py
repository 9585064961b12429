"""Which layers of a base an adapter goes on, checked before PEFT is asked: its own words help nobody to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtailor import added, find
from fedtailor.errors import UserError, suggest
from fedtailor.models import Resident

NAMES = {  # what transformers calls these layers in vision models, by version and architecture
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
    "feedforward": ("mlp.fc2", "mlp.dense2", "output.dense"),
}


KINDS = {"causal": "a causal model", "encoder": "an encoder", "vision": "a vision model", "seq2seq": "an encoder-decoder"}


def claimed(method: Any, resident: Resident) -> None:
    """Raises UserError where the method does not say that it can be put on this kind of base."""
    mine = getattr(method, "FOR", (resident.kind,))
    if resident.kind not in mine:
        others = [n for n, kind in find.methods().items() if resident.kind in getattr(kind, "FOR", (resident.kind,))]
        name, words = type(method).__module__.rpartition(".")[2], [KINDS[kind] for kind in mine]
        what = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
        raise UserError(
            f"[method] {name} needs {what}: {type(resident.module).__name__} is {KINDS[resident.kind]}; "
            f"choose another method ({', '.join(others)}) or another base"
        )


def usual(resident: Resident, *parts: str) -> list[str] | None:
    """Query and value, or these parts, of a vision model, for which PEFT has no choice of its own; else None: it has."""
    if resident.kind != "vision":
        return None
    found = []
    for part in parts or ("query", "value"):
        name = next((n for n in NAMES[part] if any(layer.endswith(f".{n}") for layer in resident.plan)), None)
        if name is None:
            known = sorted({layer.rpartition(".")[2] for layer in added.linear(resident.plan)})
            raise UserError(f"[method] targets: no {part} layer known in {type(resident.module).__name__}; name some of {known}")
        found.append(name)
    return found


def chosen(targets: Sequence[str], resident: Resident) -> list[str] | None:
    """As PEFT takes them; None: its own choice for the architecture. Raises UserError for a name that no layer ends in."""
    if list(targets) == ["all-linear"]:  # as PEFT calls them
        return list(added.linear(resident.plan))
    for target in targets:
        held = sorted({n.rpartition(".")[2] for n in added.linear(resident.plan) if f".{target}." in f".{n}"}) if target else []
        if held and not any(n.endswith(f".{target}") for n in added.linear(resident.plan)):
            raise UserError(f"[method] targets = {target!r}: it is no layer that an adapter goes on; name some in it: {held}")
        if not target or not any(name == target or name.endswith(f".{target}") for name in resident.plan):
            known = {name.rpartition(".")[2] for name in added.linear(resident.plan)}
            kind = type(resident.module).__name__
            raise UserError(f"[method] targets = {target!r}: no layer of {kind} is called so{suggest(target, known)}")
    return list(targets) or None


def fitting(rank: int, tensors: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where `rank` is more than a layer has: `tensors` are the shapes of what was made for it."""
    for name, shape in tensors.items():
        if len(shape) != 2:
            continue  # a convolution's, whose other numbers are its kernel's
        wide = shape[1] if ".lora_A." in name else shape[0] if ".lora_B." in name else rank
        if wide < rank:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            raise UserError(f"[method] rank = {rank}: {layer} has {wide} numbers on a side; choose {wide} at most")
