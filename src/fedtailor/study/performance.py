"""Is federated as good as centralized, better than the rows that need no federation, and which method is best?

Federated against centralized is a question of non-inferiority: that a test finds no difference would not show that there
is none. All else is asked by two-sided paired t tests; methods among each other with Holm's adjustment over their pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from fedtailor.figures import ROWS, metric_of, number
from fedtailor.study.compare import LEVEL, Paired, holm, interval, non_inferior, paired
from fedtailor.study.grid import At, Study, shown
from fedtailor.study.points import OWN, Points
from fedtailor.study.wording import (
    Finding,
    amount,
    comparative,
    finding,
    listed,
    over,
    p_of,
    p_value,
    parted,
    percent,
    seeds_of,
    tests,
    untested,
)  # fmt: skip

OTHERS = ("alone", OWN, "zero_shot", "few_shot")
Values = Mapping[int, float]  # by seed


def told(study: Study, points: Points) -> Iterator[Finding]:
    """Every point's federated row against the others, then the methods against each other."""
    for at in points.all:
        if not points.values(at, "federated"):
            continue
        if "centralized" in points.part.rows:
            yield close(study, points, at)
        for row in OTHERS:
            if row.partition(".")[0] in points.part.rows and (row != OWN or points.values(at, OWN)):
                yield _against(points, at, row)
    if "method" in points.part.axes:
        for rest, group in points.apart("method"):
            yield from _methods(points, rest, group)


def close(study: Study, points: Points, at: At) -> Finding:
    """Federated against centralized: at most `study.margin` worse, in the metric's own unit."""
    one, other = points.values(at, "federated"), points.values(at, "centralized")
    margin, label = amount(study.margin, points.metric), metric_of(points.metric).label
    claim = f"federated is at most {margin} worse than centralized"
    if not points.better:
        return finding(points, at, f"not shown: that {claim}; which way {label} is better is not known", "none", None)
    found = non_inferior(one, other, study.margin, points.better)
    if not found.n:
        return finding(points, at, f"not shown: that {claim}; centralized has no seed in common with it", "none", None)
    figures = [interval({s: values[s] for s in found.difference.values}).mean for values in (one, other)]
    shares = f", {percent(found.ratio)} of it" if found.ratio.n else ""
    numbers = (f"{label} {number(figures[0])} against {number(figures[1])}{shares}, "
               f"{comparative(found.difference, points.metric, points.better)}")
    if math.isnan(found.p):
        seed = "with one seed " if found.n == 1 else ""
        return finding(points, at, f"not shown: that {claim}; {seed}{numbers}", untested([found.difference]), None)
    test = f"paired one-sided t of non-inferiority over {seeds_of(found.difference)}, margin {margin}, {p_value(found.p)}"
    if found.holds:
        return finding(points, at, f"{claim}: {numbers}", test, True)
    if found.p_inferior < LEVEL:
        test = f"paired one-sided t over {seeds_of(found.difference)}, margin {margin}, {p_value(found.p_inferior)}"
        return finding(points, at, f"federated is more than {margin} worse than centralized: {numbers}", test, False)
    return finding(points, at, f"not shown: that {claim}; {numbers}", test, None)


def _against(points: Points, at: At, row: str) -> Finding:
    other = points.values(at, row)
    one = points.values(at, "federated", "silos" if row == OWN else "")
    name = "each silo's own model on its own rows" if row == OWN else ROWS.get(row, row)
    return finding(points, at, *compared(paired(one, other), "federated", name, points))


def compared(
    found: Paired, one: str, other: str, points: Points, p: float | None = None, of: int = 1
) -> tuple[str, str, bool | None]:
    """Text, test and whether a difference is shown; `p` as adjusted over `of` tests."""
    p = found.p if p is None else p
    if not found.n:
        return f"not shown: that {one} differs from {other}, which has no seed in common with it", "none", None
    apart = comparative(found.difference, points.metric, points.better)
    if math.isnan(p):
        seed = "with one seed " if found.n == 1 else ""
        return f"not shown: that {one} differs from {other}; {seed}it is {apart}", untested([found.difference]), None
    test = f"paired two-sided t over {seeds_of(found.difference)}, {p_value(p)}{f' (Holm over {of})' if of > 1 else ''}"
    if not p < LEVEL:
        return f"not shown: that {one} differs from {other}; it is {apart}", test, None
    size, word, bracket = parted(found.difference, points.metric, points.better)
    return f"{one} is {word} than {other} by {size}{bracket}", test, True


def pairs(values: Mapping[str, Values]) -> list[tuple[str, str, Paired, float]]:
    """Every two of these: which, one minus the other, and p by Holm over all of them."""
    names = list(itertools.combinations(values, 2))
    found = [paired(values[a], values[b]) for a, b in names]
    return [(a, b, one, p) for (a, b), one, p in zip(names, found, holm([one.p for one in found]), strict=True)]


def _methods(points: Points, rest: At, group: list[At]) -> Iterator[Finding]:
    """Those with a difference, a sentence each; then all the others in one."""
    values = {shown(at["method"]): points.values(at, "federated") for at in group}
    tested = pairs({name: told for name, told in values.items() if told})
    of = tests(p for *_, p in tested)
    left = []
    for a, b, found, p in tested:
        if p < LEVEL:
            yield finding(points, rest, *compared(found, f"method {a}", b, points, p, of))
        else:
            left.append((a, b, found, p))
    if not left:
        return
    one = [f"{a} from {b} (it is {comparative(found.difference, points.metric, points.better)})" if found.n
           else f"{a} from {b}" for a, b, found, _ in left]  # fmt: skip
    text = f"not shown: a difference of method {listed(one)}"
    if of:
        ps = ", ".join(f"{a}, {b}: {p_of(p, found.difference)}" for a, b, found, p in left if found.n > 1)
        counts = sorted({found.n for _, _, found, _ in left})
        seeds = over(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        yield finding(points, rest, text, f"paired two-sided t over {seeds}, Holm over {of}: {ps}", None)
    else:
        yield finding(points, rest, text, untested(found.difference for _, _, found, _ in left), None)

