"""`fedtailor chat`: lines in, the customized model's answers out."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from fedtailor import data, images, models, rows, runs, wire
from fedtailor.data import Row
from fedtailor.errors import SiloError, UserError


def talk(folder: Path, out: Console, *, temperature: float, top_p: float, max_new_tokens: int, seed: int) -> None:
    """Until an empty line, the end of input, or Ctrl-C. Raises UserError when the folder holds no finished adapter."""
    adapters = sorted((*folder.glob("adapter/served.safetensors"), *folder.glob("seed-*/adapter/served.safetensors")))
    file = folder / "experiment.toml"
    if not adapters or not file.exists():
        raise UserError(
            f"{folder}: no finished run there (no adapter/served.safetensors); finish it with `fedtailor run --resume {folder}`"
        )
    experiment = runs.resume(folder).experiment
    if hasattr(experiment.method, "judge"):
        raise UserError(f"{folder}: it answers from silos' documents; ask it with `fedtailor ask --run {folder}`")
    model = wire.read_file(adapters[0]).open({"base": models.load(experiment.model)})
    template = experiment.data.template
    fields = (experiment.data.image,) if experiment.data.image else rows.columns(template) if template else ()
    labels = experiment.data.labels
    if experiment.data.label and not labels:  # the words were read off the rows
        loaded = data.load(experiment.data, experiment.silo, experiment.seeds[0])
        labels = next((silo.labels for silo in loaded.silos.values() if silo.labels), ())
    turns: list[dict[str, str]] = []
    while True:
        values = {}
        for field in fields or ("you",):
            line = _asked(f"{field}> ")
            if not line:
                return
            values[field] = line
        if experiment.data.image:
            try:
                row = Row("", "", image=images.read(values[fields[0]], Path()))
            except ValueError as error:
                out.print(f"[{error}]", markup=False)
                continue
        elif fields:
            prompt, frame = rows.filled(template, values)
            row = Row(prompt, "", frame=frame)
        else:
            turns.append({"role": "user", "content": values["you"]})
            row = Row("", "", messages=tuple(turns))
        answer = ""
        try:
            if labels:
                answer = labels[int(model.scores([row], labels).argmax())]
                out.print(answer, markup=False, highlight=False)
                continue
            for piece in model.stream(row, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
                answer += piece
                out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except SiloError as error:
            out.print(f"[{error}; {'forgetting what was said before' if turns[1:] else 'say it shorter'}]", markup=False)
            turns.clear()
            continue
        out.print()
        turns.append({"role": "assistant", "content": answer})


def _asked(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
