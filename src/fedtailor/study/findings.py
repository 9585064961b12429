"""What a study shows, and what it does not: sentences computed from its figures, each with its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedtailor.study import efficiency, performance, robustness
from fedtailor.study.grid import Study
from fedtailor.study.measured import Found
from fedtailor.study.points import Points, gather
from fedtailor.study.wording import Finding, finding, listed

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
        said += _missing(points)
    return said


def _missing(points: Points) -> list[Finding]:
    if not points.missing:
        return []
    more = len(points.missing) - NAMED
    named = [*points.missing[:NAMED], *([f"{more} more"] if more > 0 else [])]
    if not points.found:
        return [finding(points, {}, f"none of the {len(points.asked)} runs is finished", "none", None)]
    text = f"{len(points.missing)} of {len(points.asked)} runs are not finished, or have no {points.metric}: "
    return [finding(points, {}, text + listed([f"({name})" for name in named]), "none", None)]
