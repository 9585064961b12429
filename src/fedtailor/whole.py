"""`fedtailor export`: what a finished run learnt, as a folder for others; merged into the base's weights where it can be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtailor import models, runs, wire
from fedtailor.added import VIRTUAL
from fedtailor.errors import UserError


def export(run: Path, out: Path, *, merge: bool) -> None:
    """`out`: a new folder. With `merge`, what `from_pretrained` alone loads, in fp32; an encoder's head lies beside.

    Raises UserError where there is no finished adapter, where `out` is taken, or where what was learnt is no change of weights.
    """
    adapters = sorted(path.parent for path in run.glob("**/adapter/served.safetensors"))
    if not adapters:
        raise UserError(f"{run}: no finished run there (no adapter/); finish it with `fedtailor run --resume {run}`")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: taken; choose a new folder")
    base = runs.resume(run).experiment.model
    served = wire.read_file(adapters[0] / "served.safetensors")
    shutil.rmtree(beside := out.with_name(f".{out.name}.tmp"), ignore_errors=True)
    try:
        if merge:
            _merged(served, adapters[0], base, beside)
        else:
            shutil.copytree(adapters[0], beside, ignore=shutil.ignore_patterns("served.safetensors"))
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _merged(served: Any, adapter: Path, base: models.Base, folder: Path) -> None:
    if (adapter / "config.json").exists():  # full fine-tuning: it is a plain folder already
        shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("served.safetensors"))
        return
    resident = models.fresh(base)
    tuned = served.method.put_on(resident, served.labels)
    if why := VIRTUAL if tuned.shift else tuned.added.why if tuned.added is not None else "":
        raise UserError(f"{why}, so they cannot be merged; export without --merge")
    if resident.quantized:
        raise UserError("the base is quantized: merging would round what was learnt; export without --merge")
    resident.tuned()  # off again
    module = resident.module
    if tuned.added is not None:
        _offset(module, served.tensors)
    elif tuned.peft:
        from peft import PeftModel

        module = PeftModel.from_pretrained(module, adapter).merge_and_unload()
    module.config.dtype = torch.float32
    module.save_pretrained(folder)
    resident.save_reader(folder)
    if (adapter / "head.safetensors").exists():
        shutil.copyfile(adapter / "head.safetensors", folder / "head.safetensors")


def _offset(module: Any, tensors: Any) -> None:
    """Add each change to the layer's bias. A layer without one gets it where the architecture's config can say so."""
    for name, change in tensors.items():
        if not name.startswith("added."):
            continue
        layer = module.get_submodule(name.removeprefix("added.").replace("/", "."))
        if layer.bias is None:
            flag = "attention_bias" if ".self_attn." in name.replace("/", ".") else "mlp_bias"
            if not hasattr(module.config, flag):
                kind = type(module).__name__
                raise UserError(f"{kind} cannot be saved with biases that it has not; export without --merge")
            setattr(module.config, flag, True)
            layer.bias = nn.Parameter(torch.zeros_like(change))
        with torch.no_grad():
            layer.bias += change.to(layer.bias.device)
