"""Points of a part -> lines and panels: which axis goes along, which are lines, which make small multiples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedtailor.figures import ROWS, is_number, words
from fedtailor.study.grid import At, Part, Value, shown
from fedtailor.study.marks import plain

ROW = "row"  # the axis that the rows of a part make
FEW = 4  # lines that share one plot, whatever tells them apart
SPAN = 20  # values whose largest is so many times the smallest are drawn on a logarithmic scale
NEAR = 0.09  # of the width: values closer than that are drawn at even distances

T = TypeVar("T")


@dataclass(frozen=True)
class Dimension:
    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Along:
    """An axis on paper: its values' places from 0 to 1."""

    label: str
    places: Mapping[Value, float]
    names: Sequence[str]
    ordered: bool  # numbers are joined by lines; names have no order


def dimensions(part: Part) -> list[Dimension]:
    """The axes that tell points apart: those of several values."""
    return [Dimension(axis, values) for axis, values in part.axes.items() if len(values) > 1]


def combinations(axes: Sequence[Dimension]) -> list[dict[str, Value]]:
    return [dict(zip((a.name for a in axes), values, strict=True)) for values in itertools.product(*(a.values for a in axes))]


def split(axes: Sequence[Dimension], most: int) -> tuple[list[dict[str, Value]], list[dict[str, Value]]]:
    """(lines, panels): all as lines where they are few, else the first axis of at most `most` values, a panel for each rest."""
    if math.prod(len(axis.values) for axis in axes) <= FEW:
        return combinations(axes), [{}]
    lines = next((axis for axis in axes if len(axis.values) <= most), None)
    return combinations([lines] if lines else []), combinations([axis for axis in axes if axis != lines])


def places(axis: Dimension, label: str) -> Along:
    """Positive numbers over a wide span by their logarithm, others by their value where there is room, else evenly."""
    numbers = [float(value) for value in axis.values if is_number(value)]
    ordered = len(numbers) == len(axis.values)
    values = sorted(axis.values, key=float) if ordered else list(axis.values)
    even = [place / max(len(values) - 1, 1) for place in range(len(values))]
    if not ordered:
        at = even
    elif min(numbers) > 0 and max(numbers) > SPAN * min(numbers):
        at = _between([math.log(float(value)) for value in values])
        label += ", logarithmic"
    else:
        at = _between([float(value) for value in values])
        if min((b - a for a, b in itertools.pairwise(at)), default=1) < NEAR:
            at, label = even, f"{label}, not to scale"
    return Along(label, dict(zip(values, at, strict=True)), [plain(shown(value)) for value in values], ordered)


def _between(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def told(at: At, bare: bool = False) -> str:
    """A point in words; `bare`: its values without their axes' names."""
    said = []
    for axis, value in at.items():
        text = label_of(str(value)) if axis == ROW else plain(shown(value))
        said.append(text if bare or axis in (ROW, "method") else f"{plain(axis.rpartition('.')[2])} {text}")
    return ", ".join(said)


def label_of(row: str) -> str:
    return ROWS.get(row) or words(row)


def batches(all_of: Sequence[T], most: int) -> list[Sequence[T]]:
    """In order, as even as can be, `most` in each at most."""
    count = math.ceil(len(all_of) / most)
    size = math.ceil(len(all_of) / count) if count else 0
    return [all_of[start : start + size] for start in range(0, len(all_of), size)] if size else []
