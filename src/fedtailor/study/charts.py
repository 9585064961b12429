"""Figures of a study -> charts: what each part shows, with its caption and a text for those who do not see it.

    performance  dots: every point of the part, a mark for each row, seeds faint, 95 % intervals
    robustness   quality along the part's axis, a line for each combination of the others, small multiples
    efficiency   quality against bytes and seconds with the Pareto front, and learning curves by bytes
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fedtailor.figures import metric_of, number
from fedtailor.study import costs, efficiency, marks, panels
from fedtailor.study.compare import Interval, interval
from fedtailor.study.grid import At, Part, Study, shown
from fedtailor.study.measured import Found
from fedtailor.study.points import OWN, Points, gather
from fedtailor.study.series import ROW, Dimension, batches, dimensions, label_of, places, split, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_INCHES = 7.6  # of a dot plot's lines: more would not fit a page of A4 with what is written below
MOST_PANELS = 12
UNITS = {"loss": "nats per token", "silos_asked": "silos per question", "bleu": "0 to 100"}
AXES = {
    "alpha": "alpha of the Dirichlet split (smaller: silos differ more)", "silos": "number of silos",
    "participation": "share of the silos drawn each round", "rounds": "number of rounds",
    "dropout": "dropout: share of replies that never arrive", "label noise": "share of training labels changed",
    "attackers": "number of silos that attack", "labels per silo": "number of labels that each silo has",
    "noise": "standard deviation of the noise on replies",
}  # fmt: skip
BARS = "Marks are means over seeds, bars their 95 % intervals (Student's t)"


@dataclass(frozen=True)
class Chart:
    part: str
    name: str
    title: str
    caption: str
    svg: str  # 7 inches wide: the text of an A4 page
    png: bytes  # the same
    alt: str = ""
    column: str = ""  # SVG again, 3.5 inches wide: for a phone, or a column of a paper


@dataclass(frozen=True)
class View:
    """One part with its figures, and the words that all its charts share."""

    study: Study
    found: Sequence[Found]  # the part's
    points: Points
    command: str

    @property
    def part(self) -> Part:
        return self.points.part

    @property
    def metric(self) -> str:
        return self.points.metric

    @property
    def rows(self) -> list[str]:
        """Those of which there is a figure; silos' own models on their own rows are one more, where it is means over silos
        that performance is told in."""
        told = [row for row in self.part.rows if any(self.points.values(at, row) for at in self.points.all)]
        asked = self.part.asks == "performance" and self.points.over == "silos"
        own = asked and any(self.points.values(at, OWN) for at in self.points.all)
        return [name for row in told for name in ((row, OWN) if row == "alone" and own else (row,))]

    @property
    def axes(self) -> list[Dimension]:
        return dimensions(self.part)

    @property
    def title(self) -> str:
        """The metric at the beginning of a title."""
        label = metric_of(self.metric).label
        return label[:1].upper() + label[1:]

    @property
    def quality(self) -> str:
        """The label of the quality's axis: what over what, in what unit, which way is better."""
        metric = metric_of(self.metric)
        over = "all test rows" if self.points.over == "rows" else "mean over silos"
        unit = f", {UNITS[self.metric]}" if self.metric in UNITS else ""
        return f"{metric.label} ({over}{unit}){f', {metric.better} is better' if metric.better else ''}"

    def at(self, row: str, at: At) -> Interval | None:
        """The row at that point, over its seeds; None where no seed is finished. `at` may leave out axes of one value."""
        full = {axis: at.get(axis, values[0]) for axis, values in self.part.axes.items()}
        values = {seed: value for seed, value in self.points.values(full, row).items() if math.isfinite(value)}
        return interval(values) if values else None

    def chart(self, name: str, title: str, what: str, seen: str, draw: Callable[[float], Figure]) -> Chart:
        """Drawn for a page and for a column; `what` its marks mean, `seen` what it shows in words."""
        caption, alt, drawn, png = self.caption(what), f"{title}. {seen}", [], b""
        for width in (marks.WIDE, marks.NARROW):
            salt = f"{self.study.name}/{self.part.name}/{name}/{width}"
            with marks.style(salt):
                sheet = draw(width)
                drawn.append(marks.as_svg(sheet, title, alt, caption, salt))
                png = png or marks.as_png(sheet, title, f"{alt} {caption}")
        return Chart(self.part.name, name, title, caption, drawn[0], png, alt, drawn[1])

    def caption(self, what: str) -> str:
        seeds = sorted({one.seed for one in self.found})
        many = f"Seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"One seed ({seeds[0]}), so no intervals"
        said = [f"{what}.", f"Part {self.part.name}: {self._fixed()}.", f"{many}."]
        wanted, there = len(self.points.asked) * len(self.part.rows), len(self.found)
        if there < wanted:
            said.append(f"{wanted - there} of {wanted} results are missing and left out.")
        if self.command:
            said.append(f"Command: {self.command}.")
        return " ".join([*said, machine(self.found)]).strip()

    def _fixed(self) -> str:
        """What all points of the part have in common."""
        one = self.found[0].cell.experiment
        alone = {axis: values[0] for axis, values in self.part.axes.items() if len(values) == 1}
        common = {"model": PurePath(one.model.name).name, "data": PurePath(one.data.source).name, "rounds": one.rounds,
                  **alone, **self.part.set}  # fmt: skip
        varied = {axis.name for axis in self.axes}
        told = {axis: shown(value) for axis, value in common.items() if axis not in varied}
        return ", ".join(f"{marks.plain(axis)} {marks.plain(value)}" for axis, value in told.items())


def charts(study: Study, found: Sequence[Found], command: str = "") -> list[Chart]:
    """All charts that the figures allow, in the order of the parts; a part without figures has none.

    `command` is told in the captions. Raises UserError where matplotlib is missing.
    """
    with marks.style(study.name):  # asks for matplotlib even where nothing is to be drawn
        pass
    drawn: list[Chart] = []
    for part in study.parts:
        view = View(study, [one for one in found if one.part == part.name], gather(study, part, found), command)
        if view.rows:
            drawn += KINDS[part.asks](view)
    return drawn


def machine(found: Sequence[Found]) -> str:
    """Where the figures were made, as one sentence; "" where none tells."""
    told_by = [one.environment for one in found if one.environment]
    said = dict.fromkeys(
        f"{env.get('device', 'unknown')}, {env.get('threads', '?')} thread{'' if env.get('threads') == 1 else 's'}, "
        f"torch {env.get('torch', '?')}" for env in told_by
    )  # fmt: skip
    return f"Machine: {marks.plain('; '.join(said), 200)}." if said else ""


def tested(found: Sequence[Found]) -> str:
    """Whether all these have the same test rows, as the end of a sentence; "" where one does not tell."""
    of: dict[int, set[str]] = {}
    for one in found:
        of.setdefault(one.seed, set()).add(efficiency.tested_on(one))
    each = set().union(*of.values())
    if "" in each:
        return ""
    if len(each) == 1:
        return "; all on the same test rows"
    alike = all(len(some) == 1 for some in of.values())
    return "; test rows are drawn anew by seed" if alike else "; test rows differ between points, not by seed alone"


def _performance(view: View) -> Iterator[Chart]:
    axes = view.axes
    by = next((axis for axis in axes if axis.name == "method"), None) or max(
        axes, key=lambda axis: len(axis.values), default=Dimension("", ())
    )
    lines = []
    for at in view.points.all:
        group = told({axis.name: at[axis.name] for axis in axes if axis != by})
        there = {row: value for row in view.rows if (value := view.at(row, at))}
        lines.append(panels.Line(marks.plain(shown(at[by.name])) if by.name else view.part.name, there, group))
    groups = list(dict.fromkeys(line.group for line in lines))
    lines.sort(key=lambda line: groups.index(line.group))
    looks = marks.looks_of(view.rows)
    rows = {row: (label_of(row), looks[row]) for row in view.rows}
    said = f"{BARS}, small dots the seeds{tested(view.found)}"
    shown_at = [x for line in lines for value in line.rows.values() for x in panels.extent(value)]
    span = min(shown_at), max(shown_at)
    pages = _pages(lines, int(MOST_INCHES / panels.depth(len(rows))))
    for page, some in enumerate(pages, 1):
        seen = "; ".join(
            f"{', '.join(filter(None, [line.group, line.label]))}: "
            + (", ".join(f"{label_of(row)} {number(value.mean)}" for row, value in line.rows.items()) or "nothing yet")
            for line in some
        )  # fmt: skip
        title = f"{view.title}: {', '.join(map(label_of, view.rows))}{f' ({page} of {len(pages)})' if pages[1:] else ''}"
        yield view.chart(_numbered("quality", page), title, said, f"Means over seeds. {seen}.",
                         lambda width, some=some: panels.dots(some, rows, view.quality, span, width))  # type: ignore[misc]


def _pages(lines: Sequence[panels.Line], most: int) -> list[list[panels.Line]]:
    """`most` lines in each; a group that would be torn begins the next one, unless it is longer than a page."""
    pages: list[list[panels.Line]] = [[]]
    for _, group in itertools.groupby(lines, key=lambda line: line.group):
        for some in batches(list(group), most):
            if len(pages[-1]) + len(some) > most:
                pages.append([])
            pages[-1] += some
    return pages


def _robustness(view: View) -> Iterator[Chart]:
    line = view.part.line
    goes = next((axis for axis in view.axes if axis.name == line), None)
    if goes is None:  # an axis of one value: there is nothing to go along
        yield from _performance(view)
        return
    x = places(goes, marks.plain(AXES.get(line, line)))
    others = [axis for axis in view.axes if axis != goes]
    others += [Dimension(ROW, tuple(view.rows))] if len(view.rows) > 1 else []
    lines, rest = split(others, len(marks.LOOKS))
    drawn = []
    for of_panel in rest:
        series = {}
        for place, of_line in enumerate(lines):
            at = {**of_panel, **of_line}
            row = str(at.pop(ROW, view.rows[0]))
            values = ((x.places[value], view.at(row, {**at, line: value})) for value in x.places)
            if points := [(where, value) for where, value in values if value]:
                series[place] = points
        if series:
            drawn.append(panels.Panel(told(of_panel), series))
    looks = [(told(at, bare=len(at) == 1), look) for at, look in zip(lines, marks.LOOKS, strict=False)] if others else []
    what = BARS + (", set side by side" if looks else "")
    what += "" if x.ordered else "; values without an order are not joined"
    for page, some in enumerate(batches(drawn, MOST_PANELS), 1):
        names = [name for name, _ in looks] or [view.part.name]
        seen = _seen(some, names, lambda points: f"{number(points[0][1].mean)} to {number(points[-1][1].mean)}")
        yield view.chart(_numbered(f"along-{_safe(line)}", page), f"{view.title} along {marks.plain(line)}", what,
                         f"Means over seeds at the first and the last value. {seen}.",
                         lambda width, some=some: panels.along(some, looks, x, view.quality, width))  # type: ignore[misc]


def _efficiency(view: View) -> Iterator[Chart]:
    lines, looks = costs.looks_of(view)
    better = metric_of(view.metric).better
    for cost in costs.COSTS:
        spots, levels = costs.spots(view, cost, lines, looks)
        if not spots:
            continue
        front = ", ".join(f"{spot.name} ({cost.show(spot.cost)}, {number(spot.quality.mean)})" for spot in spots if spot.front)
        steps = ("The dotted steps join the points that no other beats in both (Pareto front), their names are bold" if front
                 else "Points were tested on different rows, so that none is said to beat another")  # fmt: skip
        yield view.chart(f"against-{cost.name}", f"{view.title} against {cost.name}",
                         f"{BARS}; costs are means over seeds, without evaluation. {steps}",
                         f"On the Pareto front: {front or 'nothing'}.",
                         lambda width, spots=spots, levels=levels, cost=cost: panels.against(  # type: ignore[misc]
                             spots, levels, looks, cost.name, (cost.label, view.quality), width))  # fmt: skip
    drawn = costs.curves(view, lines)
    label = f"validation {metric_of(view.metric).label}{f', {better} is better' if better else ''}"
    for page, some in enumerate(batches(drawn, MOST_PANELS), 1):
        seen = _seen(
            some, [name for name, _ in looks], lambda points: f"{number(points[-1][1])} at {costs.BYTES.show(points[-1][0])}"
        )
        yield view.chart(_numbered("learning", page), f"Learning curves: validation {metric_of(view.metric).label} by bytes",
                         "Lines are means over seeds; bands, where lines are few, reach from the lowest to the highest seed",
                         f"Where they end. {seen}.", lambda width, some=some: panels.curves(  # type: ignore[misc]
                             some, looks, "bytes", (costs.BYTES.label, label), width))  # fmt: skip


def _seen(some: Sequence[panels.Panel | panels.Curves], names: Sequence[str], tell: Callable[[Any], str]) -> str:
    """Each line of these panels, in words."""
    return "; ".join(
        f"{', '.join(filter(None, [panel.title, names[place]]))}: {tell(points)}"
        for panel in some for place, points in panel.series.items()
    )  # fmt: skip


def _numbered(name: str, page: int) -> str:
    return name if page == 1 else f"{name}-{page}"


def _safe(axis: str) -> str:
    """An axis as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", axis.lower()).strip("-")[:40] or "axis"


KINDS: Mapping[str, Callable[[View], Iterator[Chart]]] = {
    "performance": _performance, "robustness": _robustness, "efficiency": _efficiency,
}  # fmt: skip
