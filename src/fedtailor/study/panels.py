"""Figures -> sheets: dots with intervals, lines along an axis, quality against cost, and learning curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtailor.study import marks
from fedtailor.study.compare import Interval
from fedtailor.study.marks import RULE, SMALL, SOFT, WIDE, Look
from fedtailor.study.series import Along

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Named = Sequence[tuple[str, Look]]  # what the legend tells
LANE, BETWEEN, HEAD = 0.165, 0.12, 0.3  # inches of a dot plot: a row of a line, room around them, the name of a group

NAMED = 10  # points that are all named in a plot; of more, only those of the front are


@dataclass(frozen=True)
class Line:
    """A line of a dot plot: the rows of one point of the study."""

    label: str
    rows: Mapping[str, Interval]
    group: str = ""  # lines of one group stand together below its name


@dataclass(frozen=True)
class Panel:
    """One of several plots that share their axes: for each look a list of (x, y)."""

    title: str
    series: Mapping[int, Sequence[tuple[float, Interval]]]


@dataclass(frozen=True)
class Spot:
    """A point of quality against cost."""

    cost: float
    quality: Interval
    name: str
    look: int
    front: bool  # no other point is better in one and as good in the other


@dataclass(frozen=True)
class Level:
    """A quality without that cost: drawn across."""

    name: str
    quality: float
    look: Look


@dataclass(frozen=True)
class Curves:
    title: str
    series: Mapping[int, Sequence[tuple[float, float, float, float]]]  # (cost so far, mean, lowest, highest)


def dots(
    lines: Sequence[Line], rows: Mapping[str, tuple[str, Look]], label: str, span: tuple[float, float], width: float
) -> Figure:
    """One line of the plot for each line of the study; seeds faint, the mean over them, and its 95 % interval.

    `span` is what the x axis shows, so that two plots of one part can be compared.
    """
    headings = len({line.group for line in lines if line.group})
    deep = depth(len(rows))
    sheet = marks.figure(width, deep * len(lines) + HEAD * headings + 1.05)
    axes = sheet.add_subplot()
    y, group, ticks = 0.0, "", []
    for line in lines:
        if line.group != group:
            group = line.group
            y += HEAD
            axes.annotate(marks.plain(group, int(width * 10)), (0, y - HEAD / 2), (3, 0), textcoords="offset points",
                          xycoords=("axes fraction", "data"), va="center", fontweight="bold",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
        axes.axhline(y, color=RULE, linewidth=0.8)
        ticks.append(y + deep / 2)
        for lane, (row, (_, look)) in enumerate(rows.items()):
            if row in line.rows:
                _dot(axes, line.rows[row], y + deep / 2 + LANE * (lane - (len(rows) - 1) / 2), look)
        y += deep
    axes.axhline(y, color=RULE, linewidth=0.8)
    axes.set_ylim(y, 0)
    names = [marks.wrapped(line.label, 26 if width == WIDE else 13, 2) for line in lines]
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(*_roomy(*span))
    axes.set_xlabel(marks.wrapped(label, int(width * 11)))
    marks.legend(sheet, list(rows.values()), lines=False)
    return _settled(sheet, [axes])


def extent(value: Interval) -> list[float]:
    """All values that are drawn of it."""
    return [value.mean, *value.values.values(), *((value.low, value.high) if value.known else ())]


def _roomy(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis around these values; values that are all but equal are not torn apart."""
    wanted = max((high - low) * 1.1, 0.02 * max(abs(low), abs(high)), 1e-6)
    return (low + high - wanted) / 2, (low + high + wanted) / 2


def depth(rows: int) -> float:
    """Inches that a line of a dot plot takes."""
    return LANE * max(rows, 2) + BETWEEN


def _dot(axes: Axes, value: Interval, y: float, look: Look) -> None:
    seeds = list(value.values.values())
    if len(seeds) > 1:
        axes.plot(seeds, [y + LANE * 0.36] * len(seeds), linestyle="none", marker="o", color=look.colour, alpha=0.4, markersize=3,
                  markeredgewidth=0)  # fmt: skip
    if value.known and value.low < value.high:
        axes.plot([value.low, value.high], [y, y], color=look.colour, linewidth=1.6, solid_capstyle="butt", marker="|",
                  markersize=5, markeredgewidth=1.2)  # fmt: skip
    axes.plot([value.mean], [y], **look.line(linestyle="none"))


def along(panels: Sequence[Panel], looks: Named, x: Along, label: str, width: float) -> Figure:
    """Quality along an axis of the study, a line for each look, with 95 % intervals as whiskers."""
    sheet, grid = _grid(panels, width, bool(looks))
    columns = grid[0].get_subplotspec().get_gridspec().ncols  # type: ignore[union-attr]
    letters = max(6, int((width - 0.8) / columns * 10 / len(x.names)))
    apart = min(0.02 if x.ordered else 0.06, 0.4 / (max(len(looks), 1) * len(x.places)))
    for axes, panel in zip(grid, panels, strict=True):
        for number, points in panel.series.items():
            look = looks[number][1] if looks else marks.LOOKS[0]
            shift = (number - (len(looks) - 1) / 2) * apart if looks else 0.0
            found = sorted((place + shift, value) for place, value in points if math.isfinite(value.mean))
            axes.plot([place for place, _ in found], [value.mean for _, value in found],
                      **look.line(linestyle=look.dash if x.ordered else "none", markersize=5))  # fmt: skip
            for place, value in found:
                if value.known:
                    axes.vlines(place, value.low, value.high, color=look.colour, linewidth=1.2)
        axes.set_xticks(list(x.places.values()), [marks.wrapped(name, letters) for name in x.names])
        axes.set_xlim(-0.1, 1.1)
    heights = [y for panel in panels for points in panel.series.values() for _, value in points for y in extent(value)]
    grid[0].set_ylim(*_roomy(min(heights), max(heights)))
    sheet.supxlabel(marks.wrapped(x.label, int(width * 11)), fontsize=SMALL)
    sheet.supylabel(_upright(label), fontsize=SMALL)
    if looks:
        marks.legend(sheet, looks, lines=x.ordered)
    return _settled(sheet, grid)


def curves(panels: Sequence[Curves], looks: Named, unit: str, labels: tuple[str, str], width: float) -> Figure:
    """What validation found by what had been sent until then; bands from the lowest to the highest seed."""
    sheet, grid = _grid(panels, width, bool(looks), tall=2.9 if len(panels) == 1 else 2.1)
    costs = [point[0] for panel in panels for points in panel.series.values() for point in points]
    few = max(len(panel.series) for panel in panels) <= 4
    for axes, panel in zip(grid, panels, strict=True):
        for number, points in panel.series.items():
            look = looks[number][1] if looks else marks.LOOKS[0]
            xs, means, lows, highs = zip(*points, strict=True)
            axes.plot(xs, means, **look.line(markersize=4, markevery=max(1, len(xs) // 8)))
            if few and any(low < high for low, high in zip(lows, highs, strict=True)):
                axes.fill_between(xs, lows, highs, color=look.colour, alpha=0.13, linewidth=0)
        marks.scaled(axes, costs, unit)
    sheet.supxlabel(marks.wrapped(labels[0], int(width * 11)), fontsize=SMALL)
    sheet.supylabel(_upright(labels[1]), fontsize=SMALL)
    if looks:
        marks.legend(sheet, looks)
    return _settled(sheet, grid)


def against(
    spots: Sequence[Spot], levels: Sequence[Level], looks: Named, unit: str, labels: tuple[str, str], width: float
) -> Figure:
    """Quality against a cost; the points that no other beats in both are joined by steps and named."""
    sheet = marks.figure(width, 4.2 if width == WIDE else 4.4)
    axes = sheet.add_subplot()
    for spot in spots:
        look = looks[spot.look][1]
        if spot.quality.known:
            axes.vlines(spot.cost, spot.quality.low, spot.quality.high, color=look.colour, linewidth=1.1, alpha=0.7)
        axes.plot([spot.cost], [spot.quality.mean], **look.line(linestyle="none", markersize=7, zorder=3))
    marks.scaled(axes, [spot.cost for spot in spots], unit)
    front = sorted((spot for spot in spots if spot.front), key=lambda spot: spot.cost)
    steps = [(spot.cost, spot.quality.mean) for spot in front]
    corners = [corner for (_, y), (x, high) in itertools.pairwise(steps) for corner in ((x, y), (x, high))]
    path = [*steps[:1], *corners, *((axes.get_xlim()[1], y) for _, y in steps[-1:])]
    if path:
        axes.plot(*zip(*path, strict=True), color=SOFT, linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
    for level in levels:
        axes.axhline(level.quality, color=level.look.colour, linestyle=level.look.dash, linewidth=1.2, zorder=1)
    axes.margins(y=0.16)
    axes.set_xlabel(marks.wrapped(labels[0], int(width * 11)))
    axes.set_ylabel(_upright(labels[1]))
    if len({spot.look for spot in spots}) > 1:
        marks.legend(sheet, looks, lines=False)
    _settled(sheet, [axes])
    few = len(spots) <= NAMED
    first = sorted(spots, key=lambda spot: not spot.front)  # they choose their places first
    names = [(s.cost, s.quality.mean, s.name if few or s.front else "", s.front) for s in first]
    taken = [text.get_window_extent() for text in [_named_level(axes, level) for level in levels] if text]
    low, high = axes.get_xlim()
    ways = [*itertools.pairwise(path), *(((low, level.quality), (high, level.quality)) for level in levels)]
    ways += [((s.cost, s.quality.low), (s.cost, s.quality.high)) for s in spots if s.quality.known]
    marks.place_labels(axes, names, taken, ways)
    return sheet


def _named_level(axes: Axes, level: Level) -> Any:
    """A level's name, at the left above its line; below it where another name is there already."""
    others = [text.get_window_extent() for text in axes.texts]
    for gap, align in ((2, "bottom"), (-2, "top")):
        text = axes.annotate(level.name, (0, level.quality), (4, gap), xycoords=("axes fraction", "data"),
                             textcoords="offset points", va=align, color=level.look.colour)  # fmt: skip
        if not any(text.get_window_extent().padded(1).overlaps(other) for other in others):
            return text
        text.remove()
    return None


def _grid(panels: Sequence[Any], width: float, legend: bool, tall: float = 2.1) -> tuple[Figure, list[Axes]]:
    """Axes for small multiples: in rows of three at most, one below the other in a column; they share both axes."""
    columns = min(len(panels), 3 if width == WIDE else 1)
    if len(panels) == 4 and columns == 3:
        columns = 2
    deep = math.ceil(len(panels) / columns)
    height = deep * (3.0 if len(panels) == 1 and tall < 2.5 else tall) + 0.45 + (0.5 if legend else 0)
    sheet = marks.figure(width, height)
    grid: list[Axes] = []
    for number, panel in enumerate(panels):
        axes = sheet.add_subplot(deep, columns, number + 1, **({"sharey": grid[0]} if grid else {}))
        grid.append(axes)
        if panel.title:
            axes.set_title(marks.wrapped(panel.title, int(width / columns * 11) - 6, 2), loc="left")
        if number % columns:
            axes.tick_params(labelleft=False)
        if number + columns < len(panels) and columns > 1:
            axes.tick_params(labelbottom=False)
    return sheet, grid


def _upright(label: str) -> str:
    """The label of a y axis: which way is better stands in a line of its own."""
    what, comma, better = label.rpartition(", ")
    return f"{marks.wrapped(what, 36)}{comma.strip()}\n{better}" if what else marks.wrapped(label, 36)


def _settled(sheet: Figure, grid: Sequence[Axes]) -> Figure:
    """Laid out, and without tick labels that would touch each other."""
    sheet.draw_without_rendering()
    sheet.set_layout_engine("none")  # what is placed now stays, at any resolution
    for axes in grid:
        marks.clear(axes, "x")
    return sheet
