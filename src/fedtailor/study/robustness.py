"""How much quality is lost along one axis (skew, silos, dropout, attackers, ...), and who loses least.

A drop is the reference minus the value, seed by seed, in the direction that is worse: above 0 something is lost.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedtailor.figures import ROWS, metric_of, number
from fedtailor.study.compare import LEVEL, NAN, Paired, exceeds, holm, interval, paired
from fedtailor.study.grid import At, Study, Value, named, shown
from fedtailor.study.performance import pairs
from fedtailor.study.points import Points, ordered
from fedtailor.study.wording import (
    Finding,
    amount,
    aside,
    comparative,
    finding,
    flipped,
    listed,
    over,
    p_of,
    tests,
    untested,
    with_interval,
)  # fmt: skip

Values = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Drop:
    """What one value of the line loses against the reference."""

    value: Value
    loss: Paired  # reference minus value where higher is better, else value minus reference
    p: float  # two-sided, by Holm over the values of the line
    kept: float  # one-sided p that less than the margin is lost, by Holm over the values of the line


def told(study: Study, points: Points) -> Iterator[Finding]:
    """Who holds against attackers; every combination's line; which method loses least."""
    if not points.better:
        text = f"not shown: any drop of {metric_of(points.metric).label}; whether higher or lower is better is not known"
        yield finding(points, {}, text, "none", None)
        return
    attackers = _attackers(points)
    if attackers and "aggregate" in points.part.axes:
        yield from _aggregates(study, points, attackers)
    if points.part.line and (points.part.line != "aggregate" or not attackers):
        for rest, _ in points.apart(points.part.line):
            yield from _line(study, points, rest)
        if "method" in points.part.axes and points.part.line != "method":
            yield from _methods(points)


def _attackers(points: Points) -> str:
    """The axis of how many attack, if there is one."""
    return next((axis for axis in points.part.axes if axis.split(".")[-1] == "attackers"), "")


def drops(points: Points, rest: At, row: str, margin: float) -> list[Drop]:
    """Every value of the line but the reference, in the axis' order, where both have a seed in common.

    `rest` are the coordinates on the other axes; the margin is in the metric's unit.
    """
    line, against = points.part.line, points.part.against
    at = {_place(points, rest, value): value for value in points.part.axes.get(line, ())}
    there = {value: points.values(dict(place), row) for place, value in at.items() if dict(place) in points.all}
    if against is None or not there.get(against):
        return []
    lost = {value: lost_of(there[against], told, points.better) for value, told in there.items() if value != against}
    lost = {value: loss for value, loss in lost.items() if loss}
    found = [paired(loss, dict.fromkeys(loss, 0.0)) for loss in lost.values()]
    ps = holm([one.p for one in found])
    kept = holm([exceeds(_negative(one.difference.values), -margin) for one in found])
    return [Drop(*four) for four in zip(lost, found, ps, kept, strict=True)]


def lost_of(reference: Values, values: Values, better: str) -> dict[int, float]:
    """What is lost, seed by seed; without a known direction, the difference."""
    apart = dict(paired(reference, values).difference.values)
    return _negative(apart) if better == "lower" else apart


def _line(study: Study, points: Points, rest: At) -> Iterator[Finding]:
    """One combination of the other axes: does quality get worse along the line, how much, from where on; and where not."""
    line, against, row, label = points.part.line, points.part.against, points.main, metric_of(points.metric).label
    found = drops(points, rest, row, study.margin)
    who = f"{ROWS.get(row, row)} {label}"
    if not found or against is None:
        if len(points.part.axes[line]) > 1:
            text = f"not shown: how {who} changes along {line}; {line} {shown(against)}, or all others, are not there"
            yield finding(points, rest, text, "none", None)
        return
    start = interval(points.values(dict(_place(points, rest, against)), row)).mean
    worst = max(found, key=lambda drop: drop.loss.difference.mean)
    apart = worst.loss.difference if points.better == "lower" else flipped(worst.loss.difference)
    size = comparative(apart, points.metric, points.better)
    begin = f"from {number(start)} at {line} {shown(against)}"
    at_worst = f"at {line} {shown(worst.value)} it is {size}, {begin}"
    if not tests(drop.p for drop in found):
        seed = "with one seed, and " if max(drop.loss.n for drop in found) == 1 else ""
        text = f"not shown: that {who} gets worse along {line}; {seed}at worst, {at_worst}"
        yield finding(points, rest, text, untested(drop.loss.difference for drop in found), None)
        return
    setting = f"{counted([drop.loss for drop in found])} against {line} {shown(against)}, Holm over {tests(d.p for d in found)}"
    ps = ", ".join(f"{p_of(drop.p, drop.loss.difference)} at {shown(drop.value)}" for drop in found)
    test = f"paired two-sided t over {setting}: {ps}"
    worse = [drop.value for drop in found if drop.p < LEVEL and drop.loss.difference.mean > 0]
    raised = [shown(drop.value) for drop in found if drop.p < LEVEL and drop.loss.difference.mean < 0]
    rise = f"; it is better at {line} {listed(raised)}" if raised else ""
    if worse == [worst.value]:
        yield finding(points, rest, f"{who} is {size} at {line} {shown(worst.value)}, {begin}{rise}", test, True)
    elif worse:
        where = since(line, ordered(points.part.axes[line], against), worse, [drop.value for drop in found])
        yield finding(points, rest, f"{who} is worse {where}; {at_worst}, its worst{rise}", test, True)
    else:
        yield finding(points, rest, f"not shown: that {who} gets worse along {line}; at worst, {at_worst}{rise}", test, None)
    if "aggregate" not in rest or not _attackers(points):  # else that was said of all aggregates at once
        yield _kept(study, points, rest, found, setting)


def _kept(study: Study, points: Points, rest: At, found: list[Drop], setting: str) -> Finding:
    """Where at most the margin is lost."""
    line, margin = points.part.line, amount(study.margin, points.metric)
    test = f"paired one-sided t of non-inferiority over {setting}, margin {margin}: "
    test += ", ".join(f"{p_of(drop.kept, drop.loss.difference)} at {shown(drop.value)}" for drop in found)
    fine = [drop for drop in found if drop.kept < LEVEL]
    claim = f"{ROWS.get(points.main, points.main)} {metric_of(points.metric).label} is less than {margin} worse"
    if not fine:
        return finding(points, rest, f"not shown for any {line} but {shown(points.part.against)}: that {claim}", test, None)
    each = listed([f"{shown(drop.value)} {aside(drop.loss.difference, points.metric)}" for drop in fine])
    left = [shown(drop.value) for drop in found if drop not in fine]
    others = f"; not shown at {line} {listed(left)}" if left else ""
    return finding(points, rest, f"{claim} at {line} {each}{others}", test, True)


def since(line: str, sides: list[list[Value]], worse: list[Value], there: list[Value]) -> str:
    """Where something is lost: from one value on, where all that are there and farther from the reference lose, too."""
    told = []
    for side in ([value for value in side if value in there] for side in sides):
        first = next(i for i in range(len(side) + 1) if all(value in worse for value in side[i:]))
        last = [f"at {line} {shown(value)}" for value in side[first:]]
        last = [f"from {line} {shown(side[first])} on"] if len(last) > 1 else last
        told += [f"at {line} {shown(value)}" for value in side[:first] if value in worse] + last
    return listed(told)


def _methods(points: Points) -> Iterator[Finding]:
    """Which method loses least, at the value of the largest mean drop over all methods.

    That choice does not favour any of them: a mean over methods says nothing of the differences between them.
    """
    line, against = points.part.line, points.part.against
    for rest, group in points.apart(line, "method"):
        methods = list(dict.fromkeys(at["method"] for at in group))
        by = {m: {d.value: d.loss.difference for d in drops(points, {**rest, "method": m}, points.main, 0)} for m in methods}
        shared = [v for v in points.part.axes[line] if v != against and all(v in told for told in by.values())]
        if len(methods) < 2 or not shared:
            continue
        hardest = max(shared, key=lambda v: statistics.fmean(told[v].mean for told in by.values()))
        losses = {shown(m): told[hardest].values for m, told in by.items()}
        tested = pairs(losses)
        each = listed([f"{shown(m)} {with_interval(by[m][hardest], points.metric)}" for m in methods])
        least = min(losses, key=lambda m: statistics.fmean(losses[m].values()))
        where = f"at {line} {shown(hardest)}, where methods lose most on average"
        of = tests(p for *_, p in tested)
        if not of:
            yield finding(points, rest, f"not shown: that one method loses less than another {where}: {each}",
                          untested(found.difference for _, _, found, _ in tested), None)  # fmt: skip
            continue
        test = f"paired two-sided t of drops over {counted([found for _, _, found, _ in tested])}, Holm over {of}: "
        test += ", ".join(f"{a}, {b}: {p_of(p, found.difference)}" for a, b, found, p in tested)
        beaten = [b if least == a else a for a, b, _, p in tested if least in (a, b) and p < LEVEL]
        others = [m for m in losses if m != least and m not in beaten]
        if beaten:
            more = f"; not shown against {listed(others)}" if others else ""
            text = f"method {least} loses less than {listed(beaten)} {where}{more}: {each}"
        else:
            text = f"not shown: that method {least}, which loses least, loses less than another {where}: {each}"
        yield finding(points, rest, text, test, bool(beaten) or None)


def _aggregates(study: Study, points: Points, attackers: str) -> Iterator[Finding]:
    """With so many attackers: which aggregates lose less than the margin, and which collapse."""
    none = next((value for value in points.part.axes[attackers] if _none(value)), None)
    said: list[Finding] = []
    for rest, group in points.apart("aggregate"):
        if rest[attackers] == none:
            continue
        losses: dict[str, dict[int, float]] = {}
        halves: dict[str, tuple[dict[int, float], str]] = {}
        starts: dict[str, At] = {}
        for at in group:
            name = shown(at["aggregate"])
            start = _reference(points, at, attackers, none)
            loss = lost_of(points.values(start, points.main), points.values(at, points.main), points.better)
            if loss and start != at:
                losses[name], halves[name], starts[name] = loss, _half(points, start), start
        if losses:
            against = named(start) if none is None else f"the same aggregate at {attackers} {shown(none)}"
            poor = _poor(points, rest, starts, attackers, none) if none is not None else {}
            yield from (one for one in poor.values() if one not in said)  # with more attackers it is the same
            said += poor.values()
            losses = {name: loss for name, loss in losses.items() if name not in poor}
            yield _survivors(study, points, rest, losses, halves, against)


def _poor(points: Points, rest: At, starts: Mapping[str, At], attackers: str, none: Value) -> dict[str, Finding]:
    """Aggregates that already without attackers are as poor, against the best, as a collapse: a sentence for each.

    What loses nothing because it had nothing is not called robust.
    """
    values = {name: points.values(start, points.main) for name, start in starts.items()}
    best = max(values, key=lambda name: interval(values[name]).mean * (-1 if points.better == "lower" else 1))
    half, words = _half(points, starts[best])
    behind = {name: lost_of(values[best], told, points.better) for name, told in values.items() if name != best}
    beyond = {name: interval(lost_of(loss, half, "higher")) for name, loss in behind.items()}
    ps = dict(zip(behind, holm([exceeds(one.values) for one in beyond.values()]), strict=True))
    found = {}
    for name in (name for name, p in ps.items() if p < LEVEL):
        mean, reference = (number(interval(values[one]).mean) for one in (name, best))
        text = f"not asked of {name}: {metric_of(points.metric).label} is {mean}, against {reference} with {best}: {words}"
        test = f"paired one-sided t over {over(beyond[name].n)}, Holm over {tests(ps.values())}, {p_of(ps[name], beyond[name])}"
        at = {axis: none if axis == attackers else value for axis, value in rest.items()}
        found[name] = finding(points, at, text, test, None)
    return found


def _survivors(
    study: Study, points: Points, rest: At, losses: Mapping[str, Values], halves: Mapping[str, tuple[Values, str]], against: str
) -> Finding:
    margin, label = amount(study.margin, points.metric), metric_of(points.metric).label
    each = {name: f"{name} {aside(interval(loss), points.metric)}" for name, loss in losses.items()}
    lost = {name: interval(loss) for name, loss in losses.items()}
    kept = dict(zip(losses, holm([exceeds(_negative(loss), -study.margin) for loss in losses.values()]), strict=True))
    if not tests(kept.values()):
        seed = "with one seed " if max(one.n for one in lost.values()) == 1 else ""
        text = f"not shown: with which aggregates {label} is less than {margin} worse; {seed}it is by "
        return finding(points, rest, text + listed(list(each.values())), untested(lost.values()), None)
    beyond = {name: interval(lost_of(loss, halves[name][0], "higher")) for name, loss in losses.items()}
    gone = dict(zip(losses, holm([exceeds(excess.values) for excess in beyond.values()]), strict=True))
    fine = [name for name in losses if kept[name] < LEVEL]
    fallen = [name for name in losses if gone[name] < LEVEL and name not in fine]
    more = dict(zip(losses, holm([exceeds(loss, study.margin) for loss in losses.values()]), strict=True))
    worse = [name for name in losses if more[name] < LEVEL and name not in (*fine, *fallen)]
    left = [each[name] for name in losses if name not in (*fine, *worse, *fallen)]
    parts = [f"is less than {margin} worse with {listed([each[name] for name in fine])}"] if fine else []
    parts += [f"is more than {margin} worse with {listed([each[name] for name in worse])}"] if worse else []
    for words in dict.fromkeys(halves[name][1] for name in fallen):
        parts.append(f"collapses ({words}) with {listed([each[name] for name in fallen if halves[name][1] == words])}")
    said = [f"{ROWS.get(points.main, points.main)} {label} {'; it '.join(parts)}"] if parts else []
    said += [f"not shown whether {label} is less than {margin} worse: {listed(left)}"] if left else []
    counts = counted([Paired(interval(loss), NAN, len(loss)) for loss in losses.values()])
    test = f"paired one-sided t over {counts} against {against}"
    for asked, ps, excess in ((f"less than {margin} worse", kept, lost), (f"more than {margin} worse", more, lost),
                              ("collapse", gone, beyond)):  # fmt: skip
        each_p = ", ".join(f"{name} {p_of(p, excess[name])}" for name, p in ps.items())
        test += f"; {asked}, Holm over {tests(ps.values())}: {each_p}"
    return finding(points, rest, "; ".join(said), test, True if fine else None if left else False)


def _reference(points: Points, at: At, attackers: str, none: Value | None) -> At:
    """The same without attackers; else what the part compares with, of the aggregate mean where it is an axis' value."""
    if none is not None:
        return {**at, attackers: none}
    start = {**at, points.part.line: points.part.against} if points.part.against is not None else dict(at)
    return {**start, "aggregate": "mean"} if "mean" in points.part.axes["aggregate"] else start


def _half(points: Points, start: At) -> tuple[dict[int, float], str]:
    """What must be lost for a collapse, seed by seed, and how that is said."""
    reference = points.values(start, points.main)
    floor, sign = points.values(start, "zero_shot"), -1 if points.better == "lower" else 1
    lead = {seed: sign * (value - floor[seed]) for seed, value in reference.items() if seed in floor}
    if len(lead) == len(reference) and statistics.fmean(lead.values()) > 0:
        return {seed: value / 2 for seed, value in lead.items()}, "more than half of its lead over zero-shot is lost"
    if points.better == "lower":
        return dict(reference), "it more than doubles"
    chance = _chance(points, start)
    if chance and statistics.fmean(reference.values()) > chance:
        words = f"more than half of its lead over chance ({number(chance)}) is lost"
        return {seed: (value - chance) / 2 for seed, value in reference.items()}, words
    return {seed: value / 2 for seed, value in reference.items()}, "more than half of it is lost"


def _chance(points: Points, at: At) -> float:
    """Accuracy of guessing among the label words, where the experiment names them; else 0."""
    one = next(iter(points.of(at, points.main).values()), None)
    labels = one.cell.experiment.data.labels if one is not None and points.metric == "accuracy" else ()
    return 1 / len(labels) if labels else 0.0


def counted(found: list[Paired]) -> str:
    """3 seeds, or 2 to 3 seeds where some are missing."""
    counts = sorted({one.n for one in found})
    return over(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _none(value: Value) -> bool:
    return value == 0 or str(value).lower() in ("none", "no")


def _negative(values: Values) -> dict[int, float]:
    return {seed: -value for seed, value in values.items()}


def _place(points: Points, rest: At, value: Value) -> tuple[tuple[str, Value], ...]:
    """The point of these other coordinates and this value of the line, its axes in the part's order."""
    at = {**rest, points.part.line: value}
    return tuple((axis, at[axis]) for axis in points.part.axes)

