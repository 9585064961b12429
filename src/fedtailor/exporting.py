"""What was learnt, as others load it: PEFT's own folder; of what PEFT has not, one with a loader of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtailor.tuned import HEAD, Tuned


def save_adapter(tuned: Tuned, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """PEFT's own format, or ours with load.py beside it; an encoder's head goes beside either as head.safetensors."""
    from safetensors.torch import save_file

    if tuned.added is not None:
        added = {n.removeprefix("added."): t.contiguous() for n, t in tensors.items() if n.startswith("added.")}
        if added:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(added, folder / "added.safetensors")
            (folder / "load.py").write_text(tuned.added.loader, encoding="utf-8")
    else:
        _save_peft(tuned, tensors, folder)
    if tuned.head is not None:
        save_file({n: tensors[n].contiguous() for n in HEAD}, folder / "head.safetensors")


def _save_peft(tuned: Tuned, tensors: Mapping[str, Tensor], folder: Path) -> None:
    parameters = {name: p for name, p in tuned.inner.named_parameters() if name in tensors}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    _place(parameters, tensors)
    try:
        tuned.inner.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    finally:  # what is on the resident starts the next row: it must not have learnt from this one
        _place(parameters, before)


def _place(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
