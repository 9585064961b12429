"""`fedtailor export`: what a finished run learnt, as a folder for others; merged into the base's weights where it can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor import loaders, models, progress, runs, wire
from fedtailor.added import VIRTUAL
from fedtailor.errors import RunError, UserError
from fedtailor.models import Resident
from fedtailor.tuned import HEAD, Tuned

LEFT_OUT = shutil.ignore_patterns("served.safetensors")
ROUNDING = 2e-4  # of the largest number: what fp32 loses over the layers of a model, and more
SMALL = "The quick brown fox jumps over the lazy dog: 1234567890."


def export(run: Path, out: Path, *, merge: bool, seed: int | None = None) -> None:
    """`out`: a new folder. With `merge`, what `from_pretrained` alone loads, in fp32; an encoder's head lies beside.

    Of several seeds the first, where none is named. Raises UserError where the run is not finished, where `out` is taken, or
    where what was learnt is no change of weights; RunError where the folder, loaded again, says other than what is served.
    """
    if not (run / "result.json").exists():
        raise UserError(f"{run}: no finished run there (no result.json); finish it with `fedtailor run --resume {run}`")
    experiment = runs.resume(run).experiment
    adapter = _of_seed(run, experiment.seeds, seed) / "adapter"
    if not (adapter / "served.safetensors").exists():
        raise UserError(f"{run}: nothing to export (no {adapter.name}/): its rows have no federated one; run it with that row")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: taken; choose a new folder")
    shutil.rmtree(beside := out.with_name(f".{out.name}.tmp"), ignore_errors=True)
    try:
        if merge:
            _checked(beside, *_merged(adapter, experiment.model, beside))
        else:
            shutil.copytree(adapter, beside, ignore=LEFT_OUT)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _of_seed(run: Path, seeds: Sequence[int], seed: int | None) -> Path:
    told = ", ".join(map(str, seeds))
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed {seed}: {run} has none such (choices: {told})")
    if len(seeds) == 1:
        return run
    if seed is None:
        progress.line(f"seed {seeds[0]} of {told}: choose another with --seed")
    return run / f"seed-{seeds[0] if seed is None else seed}"


def _merged(adapter: Path, base: models.Base, folder: Path) -> tuple[Resident, Any, Tensor]:
    """The base without its weights, what is served, and what that says of `_row`."""
    served = wire.read_file(adapter / "served.safetensors")
    if not hasattr(served, "method"):
        raise UserError("what was learnt is a prompt, no change of weights; export without --merge")
    if not hasattr(served.method, "put_on"):  # whom to ask for passages, and how
        raise UserError("what was learnt is no change of the model's weights; export without --merge")
    resident = models.fresh(base)
    tuned = served.method.put_on(resident, served.labels)
    if why := VIRTUAL if tuned.shift else tuned.added.why if tuned.added is not None else "":
        raise UserError(f"{why}, so they cannot be merged; export without --merge")
    if resident.quantized:
        raise UserError("the base is quantized: merging would round what was learnt; export without --merge")
    expected = _said(resident, tuned, served.tensors)
    like = replace(resident, module=None, _tuned={})
    resident.tuned()  # off again
    if (adapter / "config.json").exists():  # full fine-tuning: it is a plain folder already
        shutil.copytree(adapter, folder, ignore=LEFT_OUT)
        return like, served, expected
    module = resident.module
    if tuned.added is not None:
        _offset(module, served.tensors)
    elif tuned.peft:
        module = _into_weights(module, adapter)
    module.config.dtype = torch.float32
    module.save_pretrained(folder)
    resident.save_reader(folder)
    if (adapter / "head.safetensors").exists():
        shutil.copyfile(adapter / "head.safetensors", folder / "head.safetensors")
    if (words := adapter / "labels.json").exists():
        loaders.classifier(resident, json.loads(words.read_text(encoding="utf-8")), folder)
    return like, served, expected


def _into_weights(module: Any, adapter: Path) -> Any:
    from peft import PeftModel

    said, read = module.get_output_embeddings(), module.get_input_embeddings()
    tied = said is not None and said.weight is read.weight
    if tied:  # a change of one of the two is none of the other
        said.weight = nn.Parameter(read.weight.detach().clone(), requires_grad=False)
    try:
        module = PeftModel.from_pretrained(module, adapter).merge_and_unload()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"PEFT cannot merge this adapter ({models.one_line(error)}); export without --merge") from error
    if tied:
        said, read = module.get_output_embeddings(), module.get_input_embeddings()
        module.config.tie_word_embeddings = torch.equal(said.weight, read.weight)  # PEFT has said that they differ
        if module.config.tie_word_embeddings:
            said.weight = read.weight
    return module


def _checked(folder: Path, like: Resident, served: Any, expected: Tensor) -> None:
    """Raises RunError where plain transformers loads another model than the one that is served."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}.get(like.kind, AutoModel)
    read = partial(auto.from_pretrained, folder, dtype=torch.float32)
    module = models.without_pooler(read) if like.kind == "vision" else read()
    again = replace(like, module=module.eval().to(expected.device))
    head = {n: t for n, t in served.tensors.items() if n in HEAD}
    found = _said(again, again.tuned(classes=served.labels), head)
    off = (found - expected).abs().max().item()
    if not off <= ROUNDING * max(1.0, expected.abs().max().item()):
        kind = type(module).__name__
        raise RunError(
            f"merged into {kind}, it says other than what is served (off by {off:.2g} at most), so nothing was written: "
            f"plain weights cannot hold it, or the files of adapter/ are not the run's own; export without --merge"
        )


def _said(resident: Resident, tuned: Tuned, tensors: Any) -> Tensor:
    """Logits of one small row: tokens from all over the vocabulary and of a text, or a picture of all brightnesses."""
    if resident.look is not None:
        shape = 1, resident.look.channels, resident.look.height, resident.look.width
        row: tuple[Any, ...] = ((torch.arange(torch.Size(shape).numel()) * 37 % 256).to(torch.uint8).view(shape),)
    else:
        spread = torch.linspace(0, int(tuned.base.config.vocab_size) - 1, 8).long()
        read = torch.tensor(resident.tokenizer(SMALL, add_special_tokens=False).input_ids)
        ids = torch.cat([spread, read])[None, : resident.context]
        count = ids.shape[1]
        mask = torch.ones_like(ids)
        row = (ids, mask, ids) if resident.kind == "seq2seq" else (ids, mask, torch.arange(count)[None], count)
    with torch.no_grad():
        made = tuned.using(tensors, *(t.to(tuned.base.device) if isinstance(t, Tensor) else t for t in row))
    return (made[0] if isinstance(made, tuple) else made).float()  # type: ignore[no-any-return]


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
                raise UserError(
                    f"{kind} cannot be saved with biases that it has not; export without --merge, which writes a load.py"
                )
            setattr(module.config, flag, True)
            layer.bias = nn.Parameter(torch.zeros_like(change))
        with torch.no_grad():
            layer.bias += change.to(layer.bias.device)
