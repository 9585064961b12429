"""What each trained row costs: bytes, seconds, FLOPs, memory, energy; in all, and until a target of quality is reached.

The target is a share of the best quality that any centralized row of the part ends with, on validation rows, with the same
seed and tested on the same rows; of federated ones where the part has no centralized row. So it is the same for all that
are compared. Bytes are those of training, all silos and all rounds together; evaluation is not counted.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtailor.figures import ROWS, duration, is_number, metric_of, number, size
from fedtailor.study.compare import LEVEL, Interval, interval
from fedtailor.study.grid import At, Study, named
from fedtailor.study.measured import Found
from fedtailor.study.performance import pairs
from fedtailor.study.points import UNSENT, UNTRAINED, Points
from fedtailor.study.wording import Finding, finding, flipped, listed, over, p_of, tests, untested

Spent = tuple[float, float]  # bytes up and down, seconds


@dataclass(frozen=True)
class Costs:
    """One trained row at one point of the grid, over its seeds. An interval without values: not known, or there is nothing
    that could be: no bytes of rows that are trained where they are."""

    at: At
    row: str
    quality: Interval  # the part's metric, on test rows
    up_each: Interval  # bytes of one silo in one round that it took part in; the exchange before the first is not one
    down_each: Interval
    up: Interval  # bytes in all
    down: Interval
    bytes: Interval  # up and down
    seconds: Interval
    parameters: Interval  # trained
    memory: Interval  # MB, the peak of the process
    energy: Interval  # Wh
    energy_how: str  # how that is known
    flops: Mapping[str, Interval]  # estimated, measured (counted): of all local steps
    until: Mapping[int, Spent | None]  # by seed, until the target; None: never reached

    @property
    def name(self) -> str:
        return named(self.at) or ROWS.get(self.row, self.row)

    def spent(self, what: int) -> Interval:
        """Bytes (0; none where nothing is sent) or seconds (1) until the target, of the seeds that reach it."""
        if what == 0 and self.row in UNSENT:
            return interval({})
        return interval({seed: told[what] for seed, told in self.until.items() if told is not None})

    @property
    def never(self) -> int:
        """Seeds that do not reach the target."""
        return sum(told is None for told in self.until.values())


def costs(points: Points, share: float) -> list[Costs]:
    """Of every trained row at every point, in the grid's order; `share` of the best quality is the target."""
    goals = targets(points, share)
    trained = [row for row in points.rows if row not in UNTRAINED]
    return [_costs(points, at, row, goals) for at in points.all for row in trained if points.of(at, row)]


def targets(points: Points, share: float) -> dict[tuple[str, int], float]:
    """By the test rows and the seed: what quality on validation rows is aimed at. A metric to be kept low: best / share."""
    best = min if points.better == "lower" else max
    found: dict[tuple[str, int], float] = {}
    for row in (points.main, "centralized"):  # the latter, where it is there
        goals: dict[tuple[str, int], list[float]] = {}
        for (_, name), seeds in points.found.items():
            for seed, one in seeds.items() if name == row else ():
                final = final_quality(one, points.metric, points.over)
                if final is not None and points.better:
                    goals.setdefault((tested_on(one), seed), []).append(final)
        found |= {place: best(finals) / share if best is min else best(finals) * share for place, finals in goals.items()}
    return found


def final_quality(one: Found, metric: str, over: str) -> float | None:
    """On validation rows, of the round that is served: the best one, else the last that was evaluated."""
    told = [(entry["round"], value) for entry in one.rounds if (value := validated(entry, metric, over)) is not None]
    return next((value for number, value in told if number == one.figures.get("best_round")), told[-1][1] if told else None)


def validated(entry: Mapping[str, Any], metric: str, over: str) -> float | None:
    """A round's quality on validation rows; None where it was not evaluated."""
    told = (entry.get("val") or {}).get(metric)
    if isinstance(told, Mapping):
        told = told["pooled"] if over == "rows" and "pooled" in told else told.get("mean")
    return float(told) if told is not None and is_number(told) else None


def until(one: Found, metric: str, over: str, target: float, better: str) -> Spent | None:
    """Bytes (up and down) and seconds until validation reaches the target for the first time, what came before the first
    round included; None if it never does."""
    moved = seconds = 0.0
    for entry in one.rounds:
        moved += entry.get("bytes_up", 0) + entry.get("bytes_down", 0)
        seconds += entry.get("seconds", 0)
        told = validated(entry, metric, over)
        if told is not None and (told <= target if better == "lower" else told >= target):
            return moved, seconds
    return None


def coarse(points: Points, group: Sequence[Costs]) -> str:
    """How finely it is known when the target is reached: "validated every 8 rounds", by the widest gap; "" for every round."""
    logs = [one.rounds for each in group for one in points.of(each.at, each.row).values()]
    tried = [[0, *(entry["round"] for entry in log if entry.get("val"))] for log in logs]
    gap = max((later - earlier for rounds in tried for earlier, later in itertools.pairwise(rounds)), default=0)
    return f"validated every {gap} rounds, so known no finer" if gap > 1 else ""


def pareto(points: Sequence[tuple[float, float]], better: str = "higher") -> list[int]:
    """Of (cost, quality) pairs, the places of those that no other beats: none is as good in both and better in one.

    Less cost is better; quality as `better` says. What is not a number is beaten.
    """
    sign = -1 if better == "lower" else 1
    told = [(cost, -sign * quality) for cost, quality in points]
    fine = [i for i, pair in enumerate(told) if all(map(math.isfinite, pair))]
    return [i for i in fine if not any(_beats(told[j], told[i]) for j in fine)]


def tested_on(one: Found) -> str:
    return str(one.figures.get("test_sha256", ""))


def comparable(points: Points, told: Sequence[Costs]) -> list[list[Costs]]:
    """Those tested on the same rows with their first seed."""
    groups: dict[tuple[int, str], list[Costs]] = {}
    for one in told:
        seeds = points.of(one.at, one.row)
        groups.setdefault((min(seeds), tested_on(seeds[min(seeds)])), []).append(one)
    return list(groups.values())


def told(study: Study, points: Points) -> Iterator[Finding]:
    """Of the rows that the part is about: which are not beaten, what the target costs, and who needs least."""
    mine = [one for one in costs(points, study.target) if one.row == points.main]
    for group in comparable(points, mine):
        sent = points.main not in UNSENT
        if len(group) > 1 and points.better and sent:
            yield _front(points, group)
        aimed = [one for one in group if one.until]
        if aimed:
            yield _reached(study, points, aimed)
        sure = [one for one in aimed if not one.never]
        if len(sure) > 1 and sent:
            yield _least(study, points, sure)
    yield from _estimated(points, mine)


def _front(points: Points, group: Sequence[Costs]) -> Finding:
    front = [group[i] for i in pareto([(one.bytes.mean, one.quality.mean) for one in group], points.better)]
    label = metric_of(points.metric).label
    each = listed([f"{one.name} ({size(one.bytes.mean)}, {number(one.quality.mean)})" for one in front])
    text = f"of {len(group)} points, no other has both fewer bytes and better {label} than {each}"
    return finding(points, {}, text, f"none: means over {over(max(one.quality.n for one in group))}", None)


def _reached(study: Study, points: Points, group: Sequence[Costs]) -> Finding:
    parts = []
    for one in group:
        if one.never < len(one.until):
            moved, took = one.spent(0), one.spent(1)
            in_some = f" (in {took.n} of {len(one.until)} seeds)" if one.never else ""
            sent = f"{size(moved.mean)} and " if moved.n else ""
            parts.append(f"{one.name} with {sent}{duration(took.mean)}{in_some}")
        else:
            parts.append(f"{one.name} never, in {over(one.never)}")
    text = f"{goal(study, points)} is reached by " + "; ".join([*parts, *filter(None, [coarse(points, group)])])
    return finding(points, {}, text, f"none: means over {over(max(len(one.until) for one in group))}", None)


def goal(study: Study, points: Points) -> str:
    """95 % of the best centralized validation accuracy"""
    row = "centralized" if "centralized" in points.rows else ROWS.get(points.main, points.main)
    return f"{100 * study.target:g} % of the best {row} validation {metric_of(points.metric).label}"


def _least(study: Study, points: Points, group: Sequence[Costs]) -> Finding:
    """Bytes until the target as ratios: logarithms are compared, since a method needs so many times as much."""
    logs = {one.name: {seed: math.log(v) for seed, v in one.spent(0).values.items() if v > 0} for one in group}
    least, *others = sorted((name for name in logs if logs[name]), key=lambda name: statistics.fmean(logs[name].values()))
    tested = pairs({name: logs[name] for name in (least, *others)})  # those with the least come first
    ratios = {other: (flipped(one.difference), p) for _, other, one, p in tested[: len(others)] if one.n}
    shown = [f"{other} {_times(ratio)}" for other, (ratio, p) in ratios.items() if p < LEVEL]
    left = [f"{other} {_times(ratio)}" for other, (ratio, p) in ratios.items() if not p < LEVEL]
    parts = [f"until {goal(study, points)}, {least} needs fewer bytes than {listed(shown)}"] if shown else []
    doubt = f"not shown: that {least}, with the fewest bytes until that target, needs fewer than"
    parts += [f"{doubt} {listed(left)}"] if left else []
    text = "; ".join([*(parts or [f"{doubt} another"]), *filter(None, [coarse(points, group)])])
    if not tests(p for _, p in ratios.values()):
        return finding(points, {}, text, untested(ratio for ratio, _ in ratios.values()), None)
    test = f"paired two-sided t of the logarithm of bytes over {over(max(ratio.n for ratio, _ in ratios.values()))}, "
    test += f"Holm over {tests(p for *_, p in tested)}: "
    test += ", ".join(f"{other} {p_of(p, ratio)}" for other, (ratio, p) in ratios.items())
    return finding(points, {}, text, test, bool(shown) or None)


def _times(told: Interval) -> str:
    """From a logarithm: (3.2 times as many, 95 % interval 2.1 to 4.8)"""
    start = f"{math.exp(told.mean):.2f} times as many"
    if not told.known or not told.half:
        return f"({start}{', with every seed' if told.known else ''})"
    return f"({start}, 95 % interval {math.exp(min(told.low, 50)):.2f} to {math.exp(min(told.high, 50)):.2f})"


def _estimated(points: Points, mine: Sequence[Costs]) -> Iterator[Finding]:
    both = [one for one in mine if one.flops["estimated"].mean > 0 and one.flops["measured"].mean > 0]
    if both:
        shares = [one.flops["estimated"].mean / one.flops["measured"].mean for one in both]
        text = f"FLOPs as estimated are {min(shares):.2f} to {max(shares):.2f} of those counted, over {len(both)} points"
        yield finding(points, {}, text, "none: counts", None)


def _costs(points: Points, at: At, row: str, goals: Mapping[tuple[str, int], float]) -> Costs:
    seeds = points.of(at, row)

    def of(take: Callable[[Found], Any]) -> Interval:
        told = {seed: take(one) for seed, one in seeds.items()}
        return interval({seed: float(value) for seed, value in told.items() if value is not None and is_number(value)})

    def cost(name: str) -> Interval:
        return of(lambda one: one.figures.get(name))

    def sent(told: Interval) -> Interval:
        return interval({}) if row in UNSENT else told

    aims = {seed: goals[place] for seed, one in seeds.items() if one.rounds and (place := (tested_on(one), seed)) in goals}
    how = dict.fromkeys(str(one.figures["energy_how"]) for one in seeds.values() if one.figures.get("energy_how"))
    return Costs(
        at, row, points.interval(at, row),
        up_each=sent(of(lambda one: each(one, "bytes_up"))), down_each=sent(of(lambda one: each(one, "bytes_down"))),
        up=sent(cost("bytes_up")), down=sent(cost("bytes_down")),
        bytes=sent(of(lambda one: _sum(one.figures.get("bytes_up"), one.figures.get("bytes_down")))),
        seconds=cost("seconds"), parameters=cost("trained_parameters"), memory=cost("peak_memory_mb"),
        energy=cost("energy_wh"), energy_how=", ".join(how),
        flops={"estimated": of(lambda one: _flops(one, "estimated")), "measured": of(lambda one: _flops(one, "measured"))},
        until={seed: until(seeds[seed], points.metric, points.over, aim, points.better) for seed, aim in aims.items()},
    )  # fmt: skip


def each(one: Found, name: str) -> float | None:
    """Bytes of one silo in one round that it was asked in; None without a log."""
    rounds = [entry for entry in one.rounds if entry.get("round", 0) > 0 and entry.get("silos")]
    asked = sum(len(entry["silos"]) for entry in rounds)
    return sum(entry.get(name, 0) for entry in rounds) / asked if asked else None


def _flops(one: Found, kind: str) -> float | None:
    """Of all local steps of all silos."""
    told: Mapping[str, Any] = getattr(one, "flops", None) or {}
    step, steps = told.get(f"{kind}_step"), told.get("steps")
    return float(step * steps) if step is not None and steps is not None and is_number(step) and is_number(steps) else None


def _sum(*values: Any) -> float | None:
    return float(sum(values)) if all(map(is_number, values)) else None


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
