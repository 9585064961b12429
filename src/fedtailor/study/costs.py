"""What a part's quality costs -> points and curves of its charts of efficiency."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtailor.figures import duration, is_number, metric_of, size
from fedtailor.study import efficiency, marks
from fedtailor.study.grid import At
from fedtailor.study.panels import Curves, Level, Spot
from fedtailor.study.points import UNSENT, UNTRAINED
from fedtailor.study.series import ROW, Dimension, label_of, split, told

if TYPE_CHECKING:
    from fedtailor.study.charts import View
    from fedtailor.study.measured import Found


@dataclass(frozen=True)
class Cost:
    name: str
    label: str
    show: Callable[[Any], str]


BYTES = Cost("bytes", "bytes up and down, all silos together (logarithmic)", size)
SECONDS = Cost("seconds", "seconds of the whole run (logarithmic)", duration)
COSTS = (BYTES, SECONDS)
# Rows without a federation: what a run of them moves is how it is run, and no cost of theirs.
LEVELS = (*UNTRAINED, *UNSENT)


def amount(one: Found, cost: Cost) -> float | None:
    """What a row cost in all, in bytes or seconds; None where it is not told or nothing."""
    parts = ("bytes_up", "bytes_down") if cost is BYTES else ("seconds",)
    told_as = [one.figures.get(part) for part in parts]
    known = [float(value) for value in told_as if value is not None and is_number(value)]
    return sum(known) if len(known) == len(parts) and sum(known) > 0 else None


def sent(view: View) -> list[str]:
    """The rows whose silos send anything to each other's benefit: they are points, the others levels to compare with."""
    return [row for row in view.rows if row not in LEVELS and any(one.row == row and amount(one, BYTES) for one in view.found)]


def looks_of(view: View) -> tuple[list[dict[str, Any]], list[tuple[str, marks.Look]]]:
    """What has a look of its own, and its name: the methods, or else another axis."""
    rows = sent(view)
    axes = sorted(view.axes, key=lambda axis: axis.name != "method")
    axes += [Dimension(ROW, tuple(rows))] if len(rows) > 1 else []
    lines, _ = split(axes, len(marks.LOOKS))
    named = [(told(at, bare=len(at) == 1) or view.part.name, look) for at, look in zip(lines, marks.LOOKS, strict=False)]
    return lines, named


def spots(view: View, cost: Cost, lines: Sequence[At], looks: Sequence[tuple[str, marks.Look]]) -> tuple[list[Spot], list[Level]]:
    """Each point's quality and cost, and the best of each row that sends nothing."""
    rows, found = sent(view), []
    for at, row in itertools.product(view.points.all, rows):
        paid = [value for one in view.points.of(at, row).values() if (value := amount(one, cost))]
        quality = view.at(row, at)
        if paid and quality:
            place = _place({**at, ROW: row}, lines)
            named = {axis.name: at[axis.name] for axis in view.axes} | ({ROW: row} if len(rows) > 1 else {})
            found.append((statistics.fmean(paid), quality, told(named, bare=len(named) == 1) or view.part.name, place))
    # Points that were tested on other rows cannot be said to beat each other.
    alike = len({efficiency.tested_on(one) for one in view.found if one.row in rows and one.seed == view.points.seeds[0]}) < 2
    costly = [(x, y.mean) for x, y, *_ in found]
    front = efficiency.pareto(costly, view.points.better) if alike and view.points.better else []
    return [Spot(*spot, number in front) for number, spot in enumerate(found)], _levels(view, rows)


def _place(at: At, lines: Sequence[At]) -> int:
    return next((place for place, line in enumerate(lines) if all(at.get(axis) == v for axis, v in line.items())), 0)


def _levels(view: View, rows: Sequence[str]) -> list[Level]:
    pick = min if metric_of(view.metric).better == "lower" else max
    looks, levels = marks.looks_of(view.rows), []
    for row in view.rows:
        means = [value.mean for at in view.points.all if (value := view.at(row, at))]
        if row not in rows and means:
            best = f"{'best ' if len({round(mean, 9) for mean in means}) > 1 else ''}{label_of(row)}"
            levels.append(Level(best, pick(means), looks[row]))
    return levels


def curves(view: View, lines: Sequence[At]) -> list[Curves]:
    """Validation by bytes so far: a panel for each point of the axes that have no look."""
    logs: dict[str, dict[int, list[list[tuple[int, float, float]]]]] = {}
    for one in view.found:
        if one.row in sent(view) and (log := _log(one, view.metric, view.points.over)):
            at: dict[str, Any] = {**one.at, ROW: one.row}
            rest = {axis.name: at[axis.name] for axis in view.axes if axis.name not in lines[0]}
            logs.setdefault(told(rest), {}).setdefault(_place(at, lines), []).append(log)
    return [Curves(title, {place: _mean(some) for place, some in sorted(series.items())}) for title, series in logs.items()]


def _log(one: Found, metric: str, over: str) -> list[tuple[int, float, float]]:
    """(round, bytes until then, quality on validation rows) of every round that was evaluated."""
    total, found = 0.0, []
    for entry in one.rounds:
        total += sum(float(entry[way]) for way in ("bytes_up", "bytes_down") if is_number(entry.get(way)))
        value = efficiency.validated(entry, metric, over)
        if value is not None and total > 0:
            found.append((int(entry["round"]), total, value))
    return found


def _mean(logs: Sequence[Sequence[tuple[int, float, float]]]) -> list[tuple[float, float, float, float]]:
    """Over seeds, round by round: (mean bytes, mean, lowest, highest); rounds that all have, so that no mean jumps."""
    shared = set.intersection(*({number for number, *_ in log} for log in logs))
    found = []
    for number in sorted(shared):
        at = [(total, value) for log in logs for n, total, value in log if n == number]
        values = [value for _, value in at]
        found.append((statistics.fmean(total for total, _ in at), statistics.fmean(values), min(values), max(values)))
    return found
