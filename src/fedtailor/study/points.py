"""A part's figures by point of its grid and row: what comparisons, tables and costs are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fedtailor import figures
from fedtailor.figures import is_number
from fedtailor.study import measured
from fedtailor.study.compare import Interval, interval
from fedtailor.study.grid import At, Part, Study, Value, named
from fedtailor.study.measured import Found

Key = tuple[tuple[str, Value], ...]
OWN = "alone.own"  # each silo's own model on its own rows, of the row "alone"
BACKDOOR = "attack_success"  # the metric that a backdoor has beside the others
UNSENT = ("alone", OWN, "centralized")  # trained where the rows are: nothing crosses a wire, whatever a run of them moves
UNTRAINED = ("zero_shot", "few_shot", "hand_written", "untrained")


@dataclass(frozen=True)
class Points:
    """One part: which points it has, finished or not, and the figures that are there."""

    part: Part
    metric: str
    over: str  # "rows" or "silos": how the metric is taken, alike for all rows of the part
    all: tuple[At, ...]  # in the grid's order
    seeds: tuple[int, ...]  # that the part asks for
    asked: tuple[tuple[Key, int], ...]  # point and seed of every cell
    found: Mapping[tuple[Key, str], Mapping[int, Found]]  # point and row -> seed -> figures
    base: str = ""  # the file of the experiment that it is laid over, where it is one

    @property
    def better(self) -> str:
        return figures.metric_of(self.metric).better

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Those of which there is any figure, in the part's order."""
        return tuple(row for row in self.part.rows if any(told == row for _, told in self.found))

    @cached_property
    def main(self) -> str:
        """The row that a part is about: federated, where it has one."""
        trained = [row for row in self.part.rows if row not in UNTRAINED]
        return "federated" if "federated" in trained else next(iter([*trained, *self.part.rows]), "")

    def of(self, at: At, row: str) -> Mapping[int, Found]:
        """By seed."""
        return self.found.get((key(at), row), {})

    def values(self, at: At, row: str, over: str = "") -> dict[int, float]:
        """The part's metric by seed, of what is finished; `over` other than the part's own."""
        if row == OWN:
            return _own(self.of(at, "alone"), self.metric)
        told = {seed: one.value(self.metric, over or self.over) for seed, one in self.of(at, row).items()}
        return {seed: value for seed, value in told.items() if value is not None}

    def interval(self, at: At, row: str) -> Interval:
        return interval(self.values(at, row))

    def apart(self, *axes: str) -> list[tuple[At, list[At]]]:
        """The points by the coordinates they have beside these axes, in the grid's order."""
        groups: dict[Key, list[At]] = {}
        for at in self.all:
            groups.setdefault(key({axis: value for axis, value in at.items() if axis not in axes}), []).append(at)
        return [(dict(rest), points) for rest, points in groups.items()]

    def told_in(self, metric: str) -> Points:
        """The same with another metric, of the points and rows that have it; none of those need be missing."""
        told = {place: {s: one for s, one in seeds.items() if metric in one.figures} for place, seeds in self.found.items()}
        there = {place: seeds for place, seeds in told.items() if seeds}
        points = tuple(one for one in self.all if any(place == key(one) for place, _ in there))
        return replace(self, metric=metric, found=there, all=points, asked=())

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Rows that are not finished, or have no figure of this metric: "method lora, seed 1: federated"."""
        told = []
        for place, seed in self.asked:
            at = dict(place)
            without = [row for row in self.part.rows if seed not in self.values(at, row)]
            if without:
                start = f"{named(at)}, " if at else ""
                told.append(f"{start}seed {seed}: {', '.join(figures.ROWS.get(row, row) for row in without)}")
        return tuple(told)


def key(at: At) -> Key:
    return tuple(at.items())


def gather(study: Study, part: Part, found: Iterable[Found]) -> Points:
    """What is finished of a part. Pooled figures are taken only where all rows have them: else two kinds were compared."""
    mine = [one for one in found if one.part == part.name]
    cells = [cell for cell in study.cells if cell.part.name == part.name]
    metric = measured.metric_of(part, mine)
    told: dict[tuple[Key, str], dict[int, Found]] = {}
    for one in mine:
        told.setdefault((key(one.at), one.row), {})[one.seed] = one
    pooled = all("pooled" in one.figures[metric] for one in mine if isinstance(one.figures.get(metric), Mapping))
    places = [(key(cell.at), cell.seed) for cell in cells] or [(key(one.at), one.seed) for one in mine]
    points = tuple(dict(place) for place in dict.fromkeys(place for place, _ in places))
    seeds = tuple(sorted({seed for _, seed in places}))
    base = part.base or study.source.get("base")
    file = Path(base).name if isinstance(base, str) else ""
    return Points(part, metric, part.over if pooled else "silos", points, seeds, tuple(dict.fromkeys(places)), told, file)


def ordered(values: Sequence[Value], against: Value) -> list[list[Value]]:
    """The values on either side of `against`, each side going away from it; one side where it is the first or the last."""
    place = list(values).index(against)
    return [side for side in ([*values[:place]][::-1], [*values[place + 1 :]]) if side]


def _own(alone: Mapping[int, Found], metric: str) -> dict[int, float]:
    told = {}
    for seed, one in alone.items():
        own = one.figures.get("own")
        figure = own.get(metric) if isinstance(own, Mapping) else None
        mean = figure.get("mean") if isinstance(figure, Mapping) else None
        if mean is not None and is_number(mean):
            told[seed] = float(mean)
    return told
