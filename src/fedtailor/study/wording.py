"""How a study's comparisons are said: differences with their intervals, p values, tests, what could not be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedtailor.figures import number
from fedtailor.study.compare import Interval
from fedtailor.study.grid import Asks, At, named
from fedtailor.study.points import Points

# Shares of 1 whose differences are said in points of 0.01.
SHARES = ("accuracy", "macro_f1", "exact_match", "recall_at_5", "share of quality")
NO_SPREAD = ", no spread between them"


@dataclass(frozen=True)
class Finding:
    """One sentence of a study, computed from its figures, and what supports it."""

    part: str
    asks: Asks
    text: str
    test: str  # "paired one-sided t over 5 seeds, p = .003, margin 2.0 points"; "none: one seed"
    holds: bool | None  # what was asked is shown; the contrary is; None: neither, or nothing was tested ("none: ...")


def finding(points: Points, at: At, text: str, test: str, holds: bool | None) -> Finding:
    """A sentence about one point, or about the part where `at` is empty; `text` is what comes after the point's name."""
    start = f"{named(at)}: " if at else ""
    return Finding(points.part.name, points.part.asks, sentence(start + text), test, holds)


def p_value(p: float) -> str:
    """p = .012; p < .001"""
    if math.isnan(p):
        return "no p"
    if p < 0.001:
        return "p < .001"
    return f"p = {p:.3f}".replace("0.", ".") if p < 0.9995 else "p = 1"


def amount(value: float, metric: str) -> str:
    """A difference of this metric: 1.5 points, or 0.012."""
    return f"{_figure(value, metric)}{' points' if metric in SHARES else ''}"


def with_interval(value: Interval, metric: str) -> str:
    """1.5 points (95 % interval 0.9 to 2.1)"""
    if not value.known:
        return amount(value.mean, metric)
    if value.half == 0:
        return f"{amount(value.mean, metric)} (with every seed)"
    return f"{amount(value.mean, metric)} (95 % interval {_figure(value.low, metric)} to {_figure(value.high, metric)})"


def aside(loss: Interval, metric: str) -> str:
    """What is lost, in brackets after a name: (1.5 points worse, 95 % interval 0.9 to 2.1); below 0 it is better."""
    size, word, bracket = parted(flipped(loss), metric, "higher")
    return f"({size} {word}{bracket.replace(' (', ', ').rstrip(')')})"


def percent(ratio: Interval) -> str:
    """98.1 % (97.0 to 99.2)"""
    shown = f"{100 * ratio.mean:.1f} %"
    return f"{shown} ({100 * ratio.low:.1f} to {100 * ratio.high:.1f})" if ratio.known and ratio.half else shown


def comparative(difference: Interval, metric: str, better: str) -> str:
    """A difference as words: 1.5 points worse (95 % interval 0.9 to 2.1)."""
    size, word, bracket = parted(difference, metric, better)
    return f"{size} {word}{bracket}"


def parted(difference: Interval, metric: str, better: str) -> tuple[str, str, str]:
    """Its size, the word for its direction, and the interval of what is said: a bound below 0 is the other way."""
    gain = flipped(difference) if better == "lower" else difference
    up, down = ("better", "worse") if better else ("higher", "lower")
    told, word = (flipped(gain), down) if gain.mean < 0 else (gain, up if gain.mean else "apart")
    size, bracket, rest = with_interval(told, metric).partition(" (")
    return size, word, bracket + rest


def flipped(value: Interval) -> Interval:
    """The difference seen from the other side."""
    return Interval(-value.mean, -value.high, -value.low, {seed: -v for seed, v in value.values.items()})


def over(n: int) -> str:
    return {0: "no seed in common", 1: "one seed"}.get(n, f"{n} seeds")


def seeds_of(difference: Interval) -> str:
    """5 seeds; and a warning where they are all alike: then a t test has no spread to go by."""
    return over(difference.n) + (NO_SPREAD if difference.half == 0 else "")


def untested(differences: Iterable[Interval]) -> str:
    """Why there is no p: none: one seed; none: 2 seeds, no spread between them."""
    n = max((one.n for one in differences), default=0)
    return f"none: {over(n)}{NO_SPREAD if n > 1 else ''}"


def p_of(p: float, difference: Interval) -> str:
    """One of several p values, with the same warning as in `seeds_of`: p < .001 (no spread between them)"""
    return p_value(p) + (f" ({NO_SPREAD.lstrip(', ')})" if difference.half == 0 else "")


def tests(ps: Iterable[float]) -> int:
    """How many of these are tests: what Holm's adjustment counts."""
    return sum(not math.isnan(p) for p in ps)


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([*filter(None, [", ".join(words[:-1])]), *words[-1:]])


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _figure(value: float, metric: str) -> str:
    told = f"{100 * value:.1f}" if metric in SHARES else number(value)
    return told.removeprefix("-") if not told.strip("-0.") else told  # no minus before nothing
