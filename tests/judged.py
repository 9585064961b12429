"""What the tests of prompt search share: silos with enough rows to choose a prompt on, and prompts that differ."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.methods.search import Search, State
from fedtailor.models import Resident
from fedtailor.tiny import tiny
from fedtailor.trying import TOGETHER, Tried

LABELS = ("poor", "good")  # of as many letters: a tiny model prefers the shorter
THINGS = ("tea", "parcel", "bear", "train", "lamp", "letter", "garden", "river", "ticket", "window")
WORDS = ("cold", "kind", "slow", "bright", "late", "calm", "loud", "clean", "dull", "warm")
AFTER = "\nMood:"
PROMPTS = (
    "{prompt}",
    "{input}\nIt was",
    "Judge this.\n\n{input}\nIt is",
    "Say whether it is poor or good.\n\n{input}\nAnswer:",
    "Text: {input}\nMood:",
    "Read with care.\n{input} ->",
    "Q: {input}\nA:",
    "How does it feel?\n\n{input}\n\nFeeling:",
    "[{input}]",
    "An expert reads: {input}\nThe expert says:",
    "{input}\n\nSo the mood is",
    "Mood of the text below.\n\n{input}\n",
)


def judged(rows: int = 60, silos: int = 3, good: float = 0.8) -> dict[str, SiloData]:
    """Silos of so many training rows, of which about `good` are good; 12 rows for validation and test each."""
    found = {}
    for number in range(silos):
        name, dice = f"silo-{number}", random.Random(number)
        every = [_row(name, i, dice, good) for i in range(rows + 24)]
        found[name] = SiloData(tuple(every[:rows]), tuple(every[rows : rows + 12]), tuple(every[rows + 12 :]), LABELS)
    return found


def _row(silo: str, number: int, dice: random.Random, good: float) -> Row:
    words = " ".join(dice.choice(WORDS) for _ in range(dice.randint(1, 4)))
    text = f"The {dice.choice(THINGS)} {number} of {silo} was {words}."
    return Row(text + AFTER, LABELS[dice.random() < good], f"{silo}-{number}", frame=(0, len(AFTER)))


def sharpened(architecture: str = "llama") -> Resident:
    """A tiny base with larger weights: in one as it is first drawn, attention is even and a prompt hardly matters."""
    base = tiny("float32", architecture)
    with torch.no_grad():
        for name, weight in base.module.named_parameters():
            if weight.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                weight.mul_(8)
    return base


def told(sums: list[float], squares: list[float], counts: list[int], unfit: list[bool] | None = None) -> Tried:
    """A silo's reply, written down."""
    numbers = torch.tensor(sums, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    return Tried(*numbers, torch.tensor(counts), tuple(unfit or [False] * len(sums)))


def searched(base: Resident, data: Mapping[str, SiloData], method: Search, rounds: int = 1, seed: int = 0) -> State:
    engine = InProcess(data, {"base": base}, seed=seed, rounds=rounds, cohort=TOGETHER)
    state = method.begin(engine.reach(0))
    for number in range(1, rounds + 1):
        state = method.round(state, engine.reach(number))
        engine.commit()
    assert engine.rejected == []
    return state
