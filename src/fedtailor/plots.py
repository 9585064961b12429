"""The learning curves of a run as inline SVG: no script, no font, no other file; the page's CSS gives the colours.

The SVG is written by hand and not by matplotlib: so the curves follow the page into dark mode and print, and a report
needs no plotting library.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedtailor.errors import UserError

# The shapes tell the rows apart without colour: (dash pattern, marker).
_SHAPES = {"federated": ("", "circle"), "centralized": ("7 4", "square"), "alone": ("2 3", "")}
_OTHER_SHAPES = (("10 3 2 3", "diamond"), ("4 2", "circle"), ("1 3", "square"))
_COLOURED = ("zero_shot", "few_shot", "alone", "federated", "centralized")
_OTHER_COLOURS = 3

CALLS = "model_calls"
_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 42
_MOST_POINTS = 120  # a curve of thousands of rounds looks the same and weighs less
_MOST_MARKERS = 24


@dataclass(frozen=True)
class Curve:
    """One trained model's validation by round; `silo` is empty unless the row has one model per silo."""

    row: str
    silo: str
    seeds: tuple[Mapping[int, Mapping[str, float]], ...]  # per seed: round -> metric -> mean over silos

    def points(self, metric: str) -> list[tuple[int, float, float, float]]:
        """(round, mean, lowest, highest over seeds), rounds ascending; only finite values count."""
        found: dict[int, list[float]] = {}
        for rounds in self.seeds:
            for number, metrics in rounds.items():
                if metric in metrics:
                    found.setdefault(number, []).append(metrics[metric])
        points = [(number, statistics.fmean(v), min(v), max(v)) for number, v in sorted(found.items())]
        if len(points) <= _MOST_POINTS:
            return points
        step = (len(points) - 1) / (_MOST_POINTS - 1)
        return [points[round(i * step)] for i in range(_MOST_POINTS)]


def colours(rows: Iterable[str]) -> dict[str, str]:
    """The CSS class of each row: its own for the known ones, in turn for the others."""
    others = [row for row in rows if row not in (*_COLOURED, "alone.own")]
    classes = {row: f"c-{row}" for row in _COLOURED} | {"alone.own": "c-alone"}
    return classes | {row: f"c-other{i % _OTHER_COLOURS}" for i, row in enumerate(others)}


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a rounds.jsonl. A torn last line (a run that was killed) is left out; any other raises UserError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            int(entry["round"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a round; delete that line, or repeat the run") from None
        found.append(entry)
    return found


def read_curves(folders: Sequence[Path]) -> list[Curve]:
    """The curves below `folders`, one folder per seed, in the order of the rows' names."""
    seeds: dict[tuple[str, str], list[Mapping[int, Mapping[str, float]]]] = {}
    for folder in folders:
        for row, silo, path in _files(folder):
            rounds = {int(entry["round"]): _validation(entry) for entry in read_rounds(path)}
            seeds.setdefault((row, silo), []).append(rounds)
    return [Curve(row, silo, tuple(found)) for (row, silo), found in sorted(seeds.items())]


def _files(folder: Path) -> Iterator[tuple[str, str, Path]]:
    rows = folder / "rows"
    has_federated = False
    for row in sorted(rows.iterdir()) if rows.is_dir() else []:
        if (row / "rounds.jsonl").is_file():
            has_federated |= row.name == "federated"
            yield row.name, "", row / "rounds.jsonl"
        else:
            for path in sorted(row.glob("*/rounds.jsonl")):
                yield row.name, path.parent.name, path
    if not has_federated and (folder / "rounds.jsonl").is_file():
        yield "federated", "", folder / "rounds.jsonl"


def _validation(entry: Mapping[str, Any]) -> dict[str, float]:
    val = entry.get("val")
    means = {}
    for metric, value in val.items() if isinstance(val, Mapping) else ():
        mean = value.get("mean") if isinstance(value, Mapping) else value
        # A diverged loss cannot be drawn; nan compares false.
        if isinstance(mean, int | float) and abs(mean) < 1e30:
            means[metric] = float(mean)
    # of the round itself, no measure on rows: how inexact its aggregation was; what a search has cost so far
    return means | {name: float(entry[name]) for name in ("gap", CALLS) if isinstance(entry.get(name), int | float)}


def draw(
    curves: Sequence[Curve], metric: str, label: str, kinds: Mapping[str, str], best: Mapping[str, Any], by: str = ""
) -> str:
    """An <svg> of `metric` by round, or "" where no curve has it. `kinds` are `colours`; `best` rings a row's round.

    `by`: another metric that goes along the axis in place of the round, over seeds the mean of it at that round.

    Values far above the others (five medians: a diverged silo) are cut off, so that the rest stays readable;
    the drawing says so.
    """
    drawn = [(curve, points) for curve in curves if (points := _along(curve.points(metric), curve.points(by) if by else None))]
    if by:
        best = {c.row: next((round(m) for n, m, *_ in c.points(by) if n == best.get(c.row)), None) for c, _ in drawn}
    if not drawn:
        return ""
    values = [value for _, points in drawn for _, *three in points for value in three]
    low, high = min(values), max(values)
    cut = low > 0 and high > 5 * (middle := statistics.median(values))
    if cut:
        high = max(value for value in values if value <= 5 * middle)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    rounds = [number for _, points in drawn for number, *_ in points]
    first, last = min(rounds), max(max(rounds), min(rounds) + 1)

    def x(number: float) -> float:
        return _LEFT + (number - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    inside = f"inside-{escape(metric)}{'-calls' if by else ''}"
    parts = [f'<clipPath id="{inside}"><rect x="{_LEFT - 6}" y="{_TOP - 6}" '
             f'width="{_WIDTH - _LEFT - _RIGHT + 12}" height="{_HEIGHT - _TOP - _BOTTOM + 12}"/></clipPath>']
    parts += _axes(ticks, x, y, first, last, "model calls, all silos together" if by == CALLS else "round")
    parts.append(f'<g clip-path="url(#{inside})">')
    # The thin lines first: the rows that the page is about stay on top.
    for curve, points in sorted(drawn, key=lambda pair: (not pair[0].silo, pair[0].row == "federated")):
        parts += _line(curve, points, kinds[curve.row], best.get(curve.row), x, y)
    parts.append("</g>")
    if cut:
        parts.append(f'<text class="note" x="{_WIDTH - _RIGHT}" y="{_TOP + 12}" text-anchor="end">'
                     f"values above {high:g} are cut off</text>")
    spoken = escape(f"{label}{'' if metric == 'gap' else ' on validation rows'} by {'model calls' if by else 'round'}")
    return (f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">'
            + "".join(parts) + "</svg>")


def swatch(curve: Curve, kind: str) -> str:
    """A piece of the curve's line, for the legend."""
    dash, marker = _shape(curve.row, kind)
    return (f'<svg class="swatch {kind}" width="34" height="12" viewBox="0 0 34 12" aria-hidden="true">'
            f'<path class="{"thin" if curve.silo else "line"}" d="M1 6H33" stroke-dasharray="{dash}"/>'
            f"{_marker(marker, 17, 6)}</svg>")


def bar(value: float, top: float, kind: str) -> str:
    """A bar as wide as `value` is of `top`; nothing drawn for values that are not finite."""
    share = 100 * min(max(value / top, 0), 1) if top > 0 and math.isfinite(value) else 0
    return (f'<svg class="bar {kind}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" width="100" height="10"/><rect class="fill" width="{share:.1f}" height="10"/></svg>')


def _shape(row: str, kind: str) -> tuple[str, str]:
    return _SHAPES.get(row) or _OTHER_SHAPES[int(kind[-1]) if kind[-1].isdigit() else 0]


def _line(
    curve: Curve, points: Sequence[tuple[int, float, float, float]], kind: str, best: Any, x: Any, y: Any
) -> Iterator[str]:
    dash, marker = _shape(curve.row, kind)
    thin = bool(curve.silo)
    name = f"{curve.row}: {curve.silo}" if thin else curve.row
    yield f'<g class="{kind}"><title>{escape(name)}</title>'
    if not thin and any(low < high for *_, low, high in points):
        edge = [f"{x(n):.1f} {y(high):.1f}" for n, _, _, high in points]
        edge += [f"{x(n):.1f} {y(low):.1f}" for n, _, low, _ in reversed(points)]
        yield f'<path class="band" d="M{"L".join(edge)}Z"/>'
    path = "L".join(f"{x(n):.1f} {y(mean):.1f}" for n, mean, *_ in points)
    yield f'<path class="{"thin" if thin else "line"}" d="M{path}" stroke-dasharray="{dash}"/>'
    if (not thin and len(points) <= _MOST_MARKERS) or len(points) == 1:
        yield from (_marker(marker or "circle", x(n), y(mean)) for n, mean, *_ in points)
    if not thin:
        yield from (f'<circle class="best" cx="{x(n):.1f}" cy="{y(mean):.1f}" r="8"/>'
                    for n, mean, *_ in points if n == best)
    yield "</g>"


def _marker(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"/>'
    if shape == "diamond":
        return f'<path class="mark" d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6-4.6 4.6-4.6-4.6z"/>'
    return ""


def _along(points: list[tuple[int, float, float, float]], by: Any) -> list[tuple[int, float, float, float]]:
    """The points at the places that `by` has for their rounds."""
    if by is None:
        return points
    places = {number: round(mean) for number, mean, *_ in by}
    return [(places[number], *values) for number, *values in points if number in places]


def _axes(ticks: Sequence[float], x: Any, y: Any, first: int, last: int, along: str) -> Iterator[str]:
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        yield f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
        shown = f"{tick:.{digits}f}" if abs(tick) < 1e5 else f"{tick:.2g}"
        yield f'<text x="{_LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{shown}</text>'
    step = max(1, round(_step((last - first) / 6)))
    for number in range(-(-first // step) * step, last + 1, step):
        yield f'<text x="{x(number):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{along}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose low..high, which may be equal."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        low, high = low - max(abs(low), 1e-3) / 10, high + max(abs(high), 1e-3) / 10
    step = _step((high - low) / 4)
    first = math.floor(low / step + 1e-9)
    return [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _step(rough: float) -> float:
    """The nearest of 1, 2, 5, 10 times a power of ten, for any `rough` above 0."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(min((1, 2, 5, 10), key=lambda m: abs(m * power - rough)) * power)
