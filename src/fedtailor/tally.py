"""What is known of each candidate in each silo: sums of scores, of squares, counts; means and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORMAL = 1.959964  # of an interval that holds the mean 95 times of 100
PRIOR = 1
UNKNOWN = 0.25  # the variance of a score in [0, 1] is no larger (Popoviciu 1935)


@dataclass(frozen=True)
class Tally:
    """C candidates, S silos. A candidate's mean is the unweighted mean over the silos that tried it, as in results."""

    sums: Tensor  # (C, S) fp64
    squares: Tensor  # (C, S) fp64; none are told under noise: then a score's variance is taken as m (1 - m), no less than it is
    counts: Tensor  # (C, S) int64
    asked: Tensor  # (C,) int64: up to which of its rows each silo was asked to try the candidate
    over: Tensor  # (C,) bool: no silo has more rows for it
    noise: float = 0.0  # variance of the noise in one released sum
    releases: Tensor | None = None  # (C, S) int64: how many released sums `sums` is made of, where there is noise

    def mean(self) -> Tensor:
        """(C,) higher is better; -inf where nothing is known."""
        seen = self.counts > 0
        silos = seen.sum(1)
        means = torch.where(seen, self.sums / self.counts.clamp(min=1), 0.0).sum(1) / silos.clamp(min=1)
        return torch.where(silos > 0, means, -math.inf)

    def error(self) -> Tensor:
        """(C,) standard error of `mean`; inf where nothing is known."""
        seen = self.counts > 0
        silos = seen.sum(1)
        spread = torch.where(seen, self.variance() / self.counts.clamp(min=1), 0.0)
        if self.noise and self.releases is not None:
            spread = spread + torch.where(seen, self.noise * self.releases / self.counts.clamp(min=1).square(), 0.0)
        return torch.where(silos > 0, spread.sum(1).sqrt() / silos.clamp(min=1), math.inf)

    def variance(self) -> Tensor:
        """(C, S) of one row's score, drawn towards the largest there can be as `PRIOR` more rows would: equal scores of a few
        rows do not make it nought."""
        n = self.counts.clamp(min=1)
        mean = (self.sums / n).clamp(0, 1)
        if self.noise:
            return (mean * (1 - mean)).clamp(min=1 / 16)  # a noisy mean of 0 or 1 is none
        apart = (self.squares - self.sums.square() / n).clamp(min=0)  # (n - 1) times the sample's variance
        return (apart + PRIOR * UNKNOWN) / (n - 1 + PRIOR)

    def interval(self, candidate: int, silo: int) -> tuple[float, float, float, int]:
        """(mean, low, high, rows) of one candidate in one silo: 95 %, normal, within [0, 1]."""
        rows = int(self.counts[candidate, silo])
        if not rows:
            return math.nan, 0.0, 1.0, 0
        mean = float(self.sums[candidate, silo]) / rows
        more = 0.0 if self.releases is None else self.noise * float(self.releases[candidate, silo]) / rows**2
        half = NORMAL * math.sqrt(float(self.variance()[candidate, silo]) / rows + more)
        return mean, max(0.0, mean - half), min(1.0, mean + half), rows

    def best(self, among: Sequence[int]) -> int:
        """The highest mean where candidates were tried on the same rows, else the highest lower bound; the first of equals.

        A candidate that was lucky on a few rows is no winner, and a new one need not have been tried as often as an old one.
        """
        means, lower = self.mean().tolist(), self.lower().tolist()
        best = among[0]
        for c in among[1:]:
            same = torch.equal(self.counts[c], self.counts[best])
            if (means[c] > means[best]) if same else (lower[c] > lower[best]):
                best = c
        return best

    def lower(self) -> Tensor:
        """(C,) two standard errors below the mean; -inf where nothing is known."""
        mean = self.mean()
        return torch.where(mean.isfinite(), mean - 2 * self.error(), -math.inf)

    def grown(self, more: int) -> Tally:
        """With `more` candidates of which nothing is known."""

        def longer(t: Tensor) -> Tensor:
            return torch.cat([t, torch.zeros(more, *t.shape[1:], dtype=t.dtype)])

        releases = None if self.releases is None else longer(self.releases)
        return Tally(
            longer(self.sums), longer(self.squares), longer(self.counts), longer(self.asked), longer(self.over),
            self.noise, releases,
        )  # fmt: skip


def folded(known: Tally, wants: Mapping[int, int], replies: Sequence[tuple[int, Any]]) -> Tally:
    """With what the silos of these numbers replied of these candidates, in the order of `wants`."""
    some = list(wants)
    sums, squares, counts = known.sums.clone(), known.squares.clone(), known.counts.clone()
    asked, over = known.asked.clone(), known.over.clone()
    releases = None if known.releases is None else known.releases.clone()
    more = torch.zeros(len(some), dtype=torch.int64)  # of the silo that had most rows left
    for silo, tried in replies:
        sums[some, silo] += tried.sums
        counts[some, silo] += tried.counts
        more = torch.maximum(more, tried.counts)
        if len(tried.squares):
            squares[some, silo] += tried.squares
        if releases is not None:
            releases[some, silo] += (tried.counts > 0).long()
    for i, (c, end) in enumerate(wants.items()):
        over[c] = bool(int(more[i]) < end - int(known.asked[c])) or any(tried.unfit[i] for _, tried in replies)
        asked[c] = int(known.asked[c]) + int(more[i]) if over[c] else end
    return Tally(sums, squares, counts, asked, over, known.noise, releases)


def empty(silos: int, noise: float = 0.0) -> Tally:
    blank = torch.zeros(0, silos, dtype=torch.float64)
    counts = torch.zeros(0, silos, dtype=torch.int64)
    return Tally(
        blank, blank.clone(), counts, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), noise,
        counts.clone() if noise else None,
    )  # fmt: skip
