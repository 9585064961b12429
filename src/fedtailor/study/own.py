"""A study of a user's own rows, made from its columns: nothing has to be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtailor import sources
from fedtailor.errors import UserError, suggest
from fedtailor.sources import Table

MOST_LABELS = 20  # different words in a column that is taken for labels
LABELS = ("label", "class", "category", "target", "y")  # names that tell
METHODS = ("prefix", "lora", "soft_prompt")  # full fine-tuning takes longest, and is for who asks for it
FEW = 4  # silos: with fewer, one attacker is a quarter of them and more


def table(
    path: Path, silo_column: str, text: str = "", label: str = "", answer: str = "", model: str = "", seeds: int = 3
) -> tuple[dict[str, Any], str]:
    """The study's table as its file would hold it, and what was taken for what, in a line. Raises UserError."""
    given = [column for column in (silo_column, text, label, answer) if column]
    if len(set(given)) < len(given):
        raise UserError("--silo-column, --text, --label and --answer: a column can be one of them")
    if label and answer:
        raise UserError("--label and --answer: a study is of labels or of written answers; leave one out")
    read = sources.read(str(path), config="", revision="", split_column="split")
    if silo_column not in read.columns:
        raise UserError(f"--silo-column {silo_column}: {path} has no such column{suggest(silo_column, read.columns)}")
    for option, column in (("--text", text), ("--label", label), ("--answer", answer)):
        if column and column not in read.columns:
            raise UserError(f"{option} {column}: {path} has no such column{suggest(column, read.columns)}")
    left = [c for c in read.columns if c not in (silo_column, "split", text, label, answer)]
    if not label and not answer:
        label = _label(read, left, text)
    left = [c for c in left if c != label]
    text = text or _text(read, left, path, need="the text", option="--text")
    if not label and not answer:
        answer = _text(read, [c for c in left if c != text], path, need="a label or an answer", option="--label or --answer")
    for index, row in enumerate(read.rows):
        for option, column in (("--silo-column", silo_column), ("--text", text), ("--label", label), ("--answer", answer)):
            if column and row.get(column) in (None, ""):
                what = f"nothing in the column {column!r} ({option})"
                raise UserError(f"{read.place(index)}: {what}; fill it in, or delete the row")
    silos = sorted({str(row[silo_column]) for row in read.rows})
    if len(silos) < 2:
        raise UserError(f"--silo-column {silo_column}: all {len(read.rows)} rows say {silos[0]!r}; a federation has two or more")
    told = f"{len(read.rows)} rows of {len(silos)} silos ({silo_column}); text: {text}; "
    told += f"label: {label} ({', '.join(_words(read, label))})" if label else f"answer: {answer}"
    made = _classify(path, silo_column, text, label) if label else _write(path, silo_column, text, answer)
    if model:
        made["base"]["model"] = {"name": model}
    made |= {"name": _name(path), "title": f"A study of {path.name}", "seeds": list(range(seeds))}
    made["part"] += _robustness(len(silos), bool(label))
    return made, told


def _classify(path: Path, silo_column: str, text: str, label: str) -> dict[str, Any]:
    data = {"source": str(path.resolve()), "template": _field(text), "label": label, "silo_column": silo_column}
    return _study("minilm", data, steps=8)


def _write(path: Path, silo_column: str, text: str, answer: str) -> dict[str, Any]:
    data = {"source": str(path.resolve()), "template": f"{_field(text)}\n", "answer": answer, "silo_column": silo_column}
    return _study("smollm2-135m", data | {"max_words": 200}, steps=4)


def _field(column: str) -> str:
    if set(column) & set("{}"):
        raise UserError(f"--text {column}: a column's name cannot hold braces; rename it")
    return f"{{{column}}}"


def _study(model: str, data: dict[str, Any], steps: int) -> dict[str, Any]:
    base = {
        "rounds": 8, "model": {"name": model}, "data": {**data, "max_val": 50, "max_test": 200},
        "method": {"name": METHODS[0], "local_steps": steps, "batch_size": 8, "optimizer_state": "keep"},
        "evaluate": {"every": 2, "samples": 0}, "engine": {"threads": 1, "cohort": 2},
    }  # fmt: skip
    performance = {
        "name": "performance", "asks": "performance", "title": "Federated against centralized, and each silo alone",
        "axes": {"method": list(METHODS)}, "rows": ["zero_shot", "alone", "federated", "centralized"], "over": "silos",
    }  # fmt: skip
    return {"base": base, "part": [performance]}


def _robustness(silos: int, labelled: bool) -> list[dict[str, Any]]:
    """Prefix-tuning under what may go wrong with these silos as they are."""
    parts: list[dict[str, Any]] = [
        {"name": "dropout", "title": "Replies that are lost", "axes": {"dropout": [0.0, 0.2, 0.4]}, "over": "silos"},
    ]
    if labelled:
        parts.append({"name": "label_noise", "title": "Wrong labels", "axes": {"label noise": [0.0, 0.2, 0.4]}, "over": "silos"})
    if silos >= FEW:
        parts.append({
            "name": "attackers", "title": "A silo that sends the opposite of what it learnt", "over": "silos",
            "set": {"faults.attack": "sign_flip", "faults.strength": 4.0},
            "axes": {"aggregate": ["mean", "median", "geometric_median"], "attackers": [0.0, round(1 / silos, 3)]},
        })  # fmt: skip
    return parts


def _label(read: Table, columns: Sequence[str], text: str) -> str:
    """The one column that holds few words, each of them often; "" without any."""
    likely = [c for c in columns if c != text and 2 <= len(_words(read, c)) <= min(MOST_LABELS, len(read.rows) // 5)]
    many = [c for c in columns if c != text and c.lower() in LABELS]
    if not likely and many:
        found = len(_words(read, many[0]))
        told = f"--data: column {many[0]!r} has {found} different words"
        raise UserError(f"{told}; if they are labels, say so with --label {many[0]}, else name --answer COLUMN")
    named = [c for c in likely if c.lower() in LABELS]
    if len(likely) > 1 and len(named) != 1:
        raise UserError(f"--data: {', '.join(likely)} could each be the label; say which with --label, or --answer COLUMN")
    return (named or likely or [""])[0]


def _text(read: Table, columns: Sequence[str], path: Path, need: str, option: str) -> str:
    """Of columns of texts the one with the longest."""
    texts = [c for c in columns if all(isinstance(row.get(c), str) for row in read.rows)]
    if not texts:
        there = ", ".join(read.columns)
        raise UserError(f"--data {path}: no column of texts is left for {need} (columns: {there}); use {option}")
    return max(texts, key=lambda c: (sum(len(row[c]) for row in read.rows), c))


def _words(read: Table, column: str) -> list[str]:
    return sorted({str(row[column]) for row in read.rows if row.get(column) not in (None, "")})


def _name(path: Path) -> str:
    return "study_" + "".join(c if c.isalnum() else "_" for c in path.stem.lower())[:40]
