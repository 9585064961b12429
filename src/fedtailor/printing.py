"""A prompt as people and programs take it away: prompt.txt to read and paste, prompt.json with what belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtailor.prompts import SLOTS, Prompt

SHOWN = ("federated", "hand_written", "centralized")

Interval = tuple[float, float, float, int]  # mean, low, high (95 %), rows


def write_prompt(
    folder: Path, prompt: Prompt, labels: Sequence[str], template: str, scores: Mapping[str, Interval], more: Mapping[str, Any]
) -> None:
    """`template`: the experiment's, for a prompt that keeps it. `scores`: by silo, of the rows that the prompt was tried on."""
    text = prompt.written(template, labels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt.txt").write_text(text, encoding="utf-8")
    said = prompt.said(labels)
    told = {
        "format": {
            "slot": SLOTS[0],  # of prompt.txt: the row's text goes there
            "template": prompt.template,
            "answers": {label: said.get(label, label) for label in labels},
            "joint": "" if text[-1:].isspace() else " ",  # between prompt and answer
        },
        "examples": [{"input": shown, "answer": answer} for shown, answer in prompt.examples],
        "scores": {
            silo: {"mean": mean, "low": low, "high": high, "rows": rows}
            for silo, (mean, low, high, rows) in scores.items()
            if rows
        },
        **more,
    }
    (folder / "prompt.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prompts(folders: Sequence[Path], result: Mapping[str, Any]) -> dict[str, Any]:
    """For the page, from a folder a seed: the text of each row's prompt, and how the federated one differs on test."""
    found = []
    for folder in folders:
        seed = folder.name.removeprefix("seed-") if folder.name.startswith("seed-") else ""
        for row in SHOWN:
            file = folder / "adapter" / "prompt.txt" if row == "federated" else folder / "rows" / row / "prompt.txt"
            if file.is_file():
                found.append({"row": row, "seed": seed, "text": file.read_text(encoding="utf-8", errors="replace")})
    federated = (result.get("rows") or {}).get("federated")
    told = federated.get("paired") if isinstance(federated, Mapping) else None
    shown = {n: d for n, d in told.items() if isinstance(d, Mapping) and "mean" in d} if isinstance(told, Mapping) else {}
    return {"found_prompts": found, "differences": shown}
