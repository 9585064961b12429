"""What was learnt, as others load it: PEFT's own folder; of what PEFT has not, one with a loader of a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fedtailor.seq2seq import EncoderDecoder
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
    elif tuned.prompted and isinstance(tuned, EncoderDecoder):
        _save_prompt(tuned, tensors, folder)
    else:
        _save_peft(tuned, tensors, folder)
    if tuned.head is not None:
        save_file({n: tensors[n].contiguous() for n in HEAD}, folder / "head.safetensors")


def _save_peft(tuned: Tuned, tensors: Mapping[str, Tensor], folder: Path) -> None:
    with _holding(tuned, tensors):
        tuned.inner.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]


def _save_prompt(tuned: Tuned, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """What stands in front of an encoder-decoder's text, (P, D): PEFT's class for it asks for a renamed method."""
    from safetensors.torch import save_file

    with _holding(tuned, tensors), torch.no_grad():
        prompt = tuned.inner.get_prompt(1)[0]  # type: ignore[operator]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompt": prompt.float().cpu().contiguous()}, folder / "added.safetensors")
    (folder / "load.py").write_text(LOAD_PROMPT, encoding="utf-8")


@contextmanager
def _holding(tuned: Tuned, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    parameters = {name: p for name, p in tuned.inner.named_parameters() if name in tensors}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    _place(parameters, tensors)
    try:
        yield
    finally:  # what is on the resident starts the next row: it must not have learnt from this one
        _place(parameters, before)


def _place(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


LOAD_PROMPT = '''"""Puts what was learnt on a base that transformers has loaded: model = load(model, folder)."""

import torch
from safetensors.torch import load_file


def load(model, folder):
    prompt = load_file(f"{folder}/added.safetensors")["prompt"]

    def longer(mask):  # the trained places are seen by all
        return torch.cat([mask.new_ones(len(mask), len(prompt)), mask], dim=1)

    def encoder(_, args, kwargs):
        ids, text, mask = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        text = model.get_input_embeddings()(ids) if text is None else text
        kwargs["inputs_embeds"] = torch.cat([prompt.to(text).expand(len(text), -1, -1), text], dim=1)
        return args, kwargs if mask is None else {**kwargs, "attention_mask": longer(mask)}

    def decoder(_, args, kwargs):
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and mask.shape[1] + len(prompt) == states.shape[1]:
            kwargs["encoder_attention_mask"] = longer(mask)
        return args, kwargs

    model.get_encoder().register_forward_pre_hook(encoder, with_kwargs=True)
    model.get_decoder().register_forward_pre_hook(decoder, with_kwargs=True)
    return model
'''
