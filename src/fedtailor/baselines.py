"""Baselines are views of the data, not methods, so every method has them. In process only: they pool what silos hold.

zero_shot: the base as it is. few_shot: with examples in the prompt. alone: one silo at a time, same local steps.
centralized: one pooled silo, local steps times silos, so the same rows are seen; its optimizer is kept over rounds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedtailor.answering import Answers, fresh
from fedtailor.core import Ask
from fedtailor.data import Row, SiloData

if TYPE_CHECKING:
    from fedtailor.retrieval.corpus import Corpus

POOLED = "all_silos"
BETWEEN = "\n\n"  # after each few-shot example: a model that goes on to the next one has ended its answer


@dataclass(frozen=True)
class Bare:
    """The base as it stands, with a text in front of every prompt."""

    before: str = ""
    labels: int = 0
    turns: tuple[Mapping[str, str], ...] = ()  # the same, for chat rows

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Answers:
        resident = models["base"]
        bare = fresh(resident, None, self.labels if resident.classifier else 0)
        return Answers(resident, bare.tuned, None, BETWEEN if self.before else "", self.told)

    def told(self, row: Row) -> Row:
        """The row as it is asked."""
        if row.messages:
            first = sum(turn["role"] == "system" for turn in row.messages[:1])  # a system turn stays in front
            return replace(row, messages=(*row.messages[:first], *self.turns, *row.messages[first:]))
        return replace(row, prompt=self.before + row.prompt) if self.before else row


def zero_shot(data: Mapping[str, SiloData]) -> Bare:
    return Bare(labels=len(_labels(data)))


def few_shot(data: Mapping[str, SiloData], count: int, seed: int) -> Bare:
    """`count` training rows as examples, from different silos and of different labels as far as there are any."""
    dice = random.Random(f"few-shot/{seed}")
    silos, labels = list(data), list(_labels(data))
    dice.shuffle(silos)
    dice.shuffle(labels)
    examples: list[Row] = []
    for i in range(count):
        rows = [row for row in data[silos[i % len(silos)]].train if row not in examples]
        wanted = [row for row in rows if not labels or row.answer == labels[i % len(labels)]] or rows
        if wanted:
            examples.append(dice.choice(wanted))
    turns = [t for row in examples for t in (*row.messages, {"role": "assistant", "content": row.answer})]
    chat = tuple(turn for turn in turns if turn["role"] != "system") if examples and examples[0].messages else ()
    return Bare("" if chat else "".join(_shown(row) for row in examples), len(labels), chat)


def pooled(data: Mapping[str, SiloData]) -> dict[str, SiloData]:
    """All silos' rows as those of one."""
    train, val, test = (
        tuple(row for d in data.values() for row in getattr(d, part)) for part in ("train", "val", "test")
    )
    return {POOLED: SiloData(train, val, test, _labels(data), corpus=_corpus(data))}


def _corpus(data: Mapping[str, SiloData]) -> Corpus | None:
    """All documents as those of one silo, which lets out all: documents of silo/name."""
    parts = {name: rows.corpus for name, rows in data.items() if rows.corpus is not None}
    if not parts:
        return None
    from fedtailor.retrieval.corpus import Corpus

    return Corpus(POOLED, parts=parts)


def noiseless(data: Mapping[str, SiloData]) -> dict[str, SiloData]:
    """All silos as if none asked for noise: to try out what noise costs, where all rows are in this process anyway."""
    return {
        name: replace(rows, settings={k: v for k, v in rows.settings.items() if k != "epsilon"})
        for name, rows in data.items()
    }


def alone(data: Mapping[str, SiloData], silo: str) -> dict[str, SiloData]:
    """One silo, as if the others were not there."""
    return {silo: data[silo]}


def _labels(data: Mapping[str, SiloData]) -> tuple[str, ...]:
    return next(iter(data.values())).labels


def _shown(row: Row) -> str:
    joint = "" if row.prompt[-1:].isspace() else " "
    return f"{row.prompt}{joint}{row.answer}{BETWEEN}"


def _asked(row: Row) -> str:
    return str(row.image) if row.image is not None else row.prompt or row.messages[-1]["content"]


def samples(model: Answers, data: Mapping[str, SiloData], count: int, max_new_tokens: int) -> Sequence[dict[str, str]]:
    """A few test rows and what the model says to them: the first of each silo in turn."""
    order = [(silo, row) for i in range(count) for silo, d in data.items() for row in d.test[i : i + 1]][:count]
    rows = [row for _, row in order]
    if not rows:
        return []
    labels = _labels(data)
    if labels:
        told = [labels[i] for i in model.scores(rows, labels).argmax(1).tolist()]
    else:
        told = model.generate(rows, max_new_tokens=max_new_tokens)
    return [
        {"silo": silo, "prompt": _asked(row), "answer": row.answer, "generated": text}
        for (silo, row), text in zip(order, told, strict=True)
    ]
