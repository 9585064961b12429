"""What a study shows, and what it does not: sentences computed from its figures, each with its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedtailor.figures import ROWS
from fedtailor.study import efficiency, performance, robustness
from fedtailor.study.grid import Study, named
from fedtailor.study.measured import Found
from fedtailor.study.points import BACKDOOR, Points, gather
from fedtailor.study.wording import Finding, finding, listed, over, with_interval

__all__ = ["Finding", "findings"]

TOLD: dict[str, tuple[Callable[[Study, Points], Iterator[Finding]], ...]] = {
    "performance": (performance.told,),
    "efficiency": (efficiency.told,),
    "robustness": (robustness.told,),
}
NAMED = 4  # of what is missing; the others are counted


def findings(study: Study, found: Sequence[Found]) -> list[Finding]:
    """All sentences, part by part. Of a study that is not finished: what is there is said, and what is missing is named."""
    said: list[Finding] = []
    costs_apart = any(part.asks == "efficiency" for part in study.parts)
    for part in study.parts:
        points = gather(study, part, found)
        tells = TOLD[part.asks] if costs_apart or part.asks != "performance" else TOLD["performance"] + TOLD["efficiency"]
        for tell in tells if points.found else ():
            said += tell(study, points)
        said += _backdoors(points)
        said += _missing(points)
    return said


def _backdoors(points: Points) -> Iterator[Finding]:
    """How often a backdoor's trigger works, where the part is judged by something else: a sentence for each attack."""
    struck = points.told_in(BACKDOOR)
    if points.metric == BACKDOOR or not struck.found:
        return
    by = "aggregate" if "aggregate" in points.part.axes else points.part.line
    for row in struck.rows:
        for rest, group in struck.apart(by):
            there = [(named({by: at[by]}) if by else "", struck.interval(at, row)) for at in group]
            told = [with_interval(value, BACKDOOR) + (f" with {name}" if name else "") for name, value in there if value.n]
            text = f"{ROWS.get(row, row)} attack success, of rows with the trigger and lower is better, is {listed(told)}"
            if told:
                yield finding(points, rest, text, f"none: means over {over(max(value.n for _, value in there))}", None)


def _missing(points: Points) -> list[Finding]:
    if not points.missing:
        return []
    more = len(points.missing) - NAMED
    named = [*points.missing[:NAMED], *([f"{more} more"] if more > 0 else [])]
    if not points.found:
        return [finding(points, {}, f"none of the {len(points.asked)} runs is finished", "none", None)]
    text = f"{len(points.missing)} of {len(points.asked)} runs are not finished, or have no {points.metric}: "
    return [finding(points, {}, text + listed([f"({name})" for name in named]), "none", None)]
