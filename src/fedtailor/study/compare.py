"""Statistics of few paired runs: t intervals over seeds, paired t tests, non-inferiority, Holm's adjustment.

Figures come as {seed: value}. The same seed pairs two runs: same partition, rows and draws, so that differences are taken
seed by seed and only seeds that both have count. Intervals are of 95 % and tell how the mean would move with other seeds;
with other test rows, too, only where each seed draws its own. One seed has no spread: then intervals and p are nan, and
nothing is claimed. Nor is it by two seeds with equal differences, as shares of few test rows often are: p is nan.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

LEVEL = 0.05  # of all tests
SURE = 3  # seeds without any spread that are taken for a test: two agree by chance too often
NAN = float("nan")
_NOISE = 1e-12  # relative: a spread below is rounding, as of 0.3 - 0.1 and 0.4 - 0.2


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval, in the unit of the values; low and high are nan for fewer than two seeds."""

    mean: float
    low: float = NAN
    high: float = NAN
    values: Mapping[int, float] = field(default_factory=dict)  # by seed

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def half(self) -> float:
        """Half its width; nan where there is none."""
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        """Whether there is an interval: two seeds or more."""
        return math.isfinite(self.half)


@dataclass(frozen=True)
class Paired:
    """a minus b, seed by seed."""

    difference: Interval
    p: float  # two-sided, of no difference; nan for fewer than two shared seeds, or two and no spread
    n: int  # shared seeds

    @property
    def shown(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class NonInferior:
    """Whether a is at most `margin` worse than b. The difference is a minus b, whichever way is better."""

    difference: Interval
    p: float  # one-sided, of a being worse than b by the margin or more; nan as of `Paired`
    holds: bool  # p below 5 %; never without p
    margin: float  # in the metric's unit
    ratio: Interval  # a / b, seed by seed; empty where some b is not above 0
    p_inferior: float = NAN  # one-sided, of a being worse by the margin at most: small where a is clearly worse

    @property
    def n(self) -> int:
        return self.difference.n


def interval(values: Mapping[int, float]) -> Interval:
    """The mean and its 95 % interval by Student's t with n - 1 degrees of freedom. Of nothing: nan, without values."""
    told = {seed: float(values[seed]) for seed in sorted(values)}
    if not told:
        return Interval(NAN)
    mean = statistics.fmean(told.values())
    if len(told) < 2:
        return Interval(mean, values=told)
    half = float(stats.t.ppf(1 - LEVEL / 2, len(told) - 1)) * _error(told)
    return Interval(mean, mean - half, mean + half, told)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """The two-sided paired t test (Student 1908) of a against b, over the seeds of both.

    Without any spread over three seeds or more p is what it tends to: 0, or 1 where a and b are equal with every seed.
    """
    apart = _apart(a, b)
    return Paired(interval(apart), 2 * min(_above(apart, 0), _above({s: -d for s, d in apart.items()}, 0)), len(apart))


def exceeds(values: Mapping[int, float], threshold: float = 0.0) -> float:
    """p of the one-sided t test that the mean is above `threshold`; nan for fewer than two seeds, or two and no spread."""
    return _above(values, threshold)


def non_inferior(a: Mapping[int, float], b: Mapping[int, float], margin: float, better: str) -> NonInferior:
    """The one-sided paired t test that a is less than `margin` worse than b (Blackwelder 1982), at 5 %.

    `better` is "higher" or "lower", as of `figures.metric_of`; margin and values are in the metric's own unit.
    """
    sign = -1 if better == "lower" else 1
    apart = _apart(a, b)
    gain = {seed: sign * value for seed, value in apart.items()}
    p = _above(gain, -margin)
    worse = _above({seed: -value for seed, value in gain.items()}, margin)
    told = {seed: a[seed] / b[seed] for seed in apart if b[seed] > 0}
    return NonInferior(interval(apart), p, p < LEVEL, margin, interval(told if len(told) == len(apart) else {}), worse)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the given order (Holm 1979): below 5 % with at most 5 % chance of any false one.

    A nan is no test: it stays nan, and the others are adjusted as if it were not there.
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    found, highest = [NAN] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * ps[i]))
        found[i] = highest
    return found


def _apart(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """a minus b; a spread that is nothing but rounding is taken out."""
    apart = {seed: float(a[seed]) - float(b[seed]) for seed in sorted(a) if seed in b}
    scale = max((abs(v) for seed in apart for v in (a[seed], b[seed])), default=0.0)
    if apart and max(apart.values()) - min(apart.values()) <= _NOISE * scale:
        first = next(iter(apart.values()))
        return dict.fromkeys(apart, 0.0 if abs(first) <= _NOISE * scale else first)
    return apart


def _error(values: Mapping[int, float]) -> float:
    """The standard error of the mean; 0 where all values are the same."""
    told = list(values.values())
    return 0.0 if len(set(told)) == 1 else statistics.stdev(told) / math.sqrt(len(told))


def _above(values: Mapping[int, float], threshold: float) -> float:
    """p of the one-sided t test of a mean above the threshold."""
    if len(values) < 2:
        return NAN
    excess, error = statistics.fmean(values.values()) - threshold, _error(values)
    if error == 0:
        if len(values) < SURE:
            return NAN
        return 0.5 if excess == 0 else float(excess < 0)
    return float(stats.t.sf(excess / error, len(values) - 1))
