"""Served models on the very same test rows: who is right where another is wrong. Counts leave each silo."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtailor import limits
from fedtailor.core import Ask, Silo, in_silo
from fedtailor.tally import NORMAL


@dataclass(frozen=True)
class Pair:
    """Down: one model, those it is compared with, and the rows to try them on."""

    one: Any
    others: tuple[Any, ...]
    split: str = "test"


@dataclass(frozen=True)
class Discordant:
    """Up: of each other, how many rows either answers rightly alone; of none where the silo has fewer than its minimum. No
    row leaves; of a silo with one row, and no minimum, the counts are about that row."""

    rows: int
    apart: tuple[tuple[int, int], ...]  # (right with the one alone, right with the other alone)

    def problem(self, asked: Pair) -> str | None:
        if len(self.apart) != len(asked.others):
            return f"compared with {len(self.apart)}, asked {len(asked.others)}"
        fine = all(min(a, b) >= 0 and a + b <= self.rows for a, b in self.apart)
        return None if fine else "more rows apart than there are rows"


@in_silo(memory=False)
def compare(silo: Silo, body: Pair) -> Discordant:
    rows, labels = limits.counted(silo.data, body.split), silo.data.labels
    if not rows or not labels:
        return Discordant(0, ((0, 0),) * len(body.others))
    one, *others = (_right(served.open(silo.models), rows, labels) for served in (body.one, *body.others))
    both = [list(zip(one, other, strict=True)) for other in others]
    return Discordant(
        len(rows), tuple((sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)) for pairs in both)
    )


def _right(model: Any, rows: Sequence[Any], labels: Sequence[str]) -> list[bool]:
    told = model.scores(rows, labels).argmax(1).tolist()
    return [labels[t] == row.answer for t, row in zip(told, rows, strict=True)]


def difference(replies: Sequence[Discordant], other: int = 0) -> dict[str, float]:
    """Accuracy of the one minus that of this other, the unweighted mean over silos, with its 95 % interval over rows.

    Rows on which both agree say nothing of the difference, so the interval is that of McNemar's table.
    """
    told = [reply for reply in replies if reply.rows]
    if not told:
        return {}
    counts = [(*r.apart[other], r.rows) for r in told]
    means = [(a - b) / n for a, b, n in counts]
    spread = [((a + b) / n - m * m) / n for (a, b, n), m in zip(counts, means, strict=True)]
    return _interval(statistics.fmean(means), math.fsum(spread) / len(told) ** 2)


def over_seeds(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Differences of several seeds as one: the rows' variance, which seeds share, plus that of the searches between seeds."""
    means = [one["mean"] for one in seeds.values()]
    rows = statistics.fmean(((one["high"] - one["low"]) / 2 / NORMAL) ** 2 for one in seeds.values())
    found = _interval(statistics.fmean(means), rows + statistics.variance(means) / len(means))
    return {**found, "by_seed": {str(seed): one["mean"] for seed, one in seeds.items()}}


def ask_all(ask: Ask, one: Any, others: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One minus each of the others, by name."""
    replies = [reply.body for reply in ask(compare, Pair(one, tuple(others.values())))]
    return {name: difference(replies, i) for i, name in enumerate(others)}


def _interval(mean: float, variance: float) -> dict[str, float]:
    half = NORMAL * math.sqrt(max(variance, 0.0))
    return {"mean": mean, "low": mean - half, "high": mean + half}
