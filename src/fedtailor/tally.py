"""What is known of each candidate in each silo: sums of scores, of squares, counts; means and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    reached: Tensor  # (C, S) int64: up to which of its rows the silo has tried the candidate
    ended: Tensor  # (C, S) bool: it has no more rows for it
    noise: float = 0.0  # variance of the noise in one released sum
    releases: Tensor | None = None  # (C, S) int64: how many released sums `sums` is made of, where there is noise
    present: Tensor | None = None  # (S,) bool: the silos that a round is heard in; None: all
    before: Tensor | None = None  # (S,) int64: model calls of each silo before the round; None: none

    @property
    def asked(self) -> Tensor:
        """(C,) up to which row every silo that is heard has tried the candidate, those without more rows left aside."""
        reached, ended = self._heard(self.reached), self._heard(self.ended)
        behind = torch.where(ended, torch.iinfo(torch.int64).max, reached).amin(1)
        return torch.where(ended.all(1), reached.amax(1), behind)

    @property
    def over(self) -> Tensor:
        """(C,) whether no silo that is heard has more rows for the candidate."""
        return self._heard(self.ended).all(1)

    @property
    def spent(self) -> int:
        """Model calls of this round so far, of the silo that made most."""
        calls = self.counts.sum(0) - (0 if self.before is None else self.before)
        return int(calls.max()) if calls.numel() else 0

    def begun(self, present: Sequence[int]) -> Tally:
        """As a round finds it that hears these silos."""
        heard = torch.zeros(self.counts.shape[1], dtype=torch.bool)
        heard[list(present)] = True
        return replace(self, present=heard, before=self.counts.sum(0))

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
        mean = min(1.0, max(0.0, float(self.sums[candidate, silo]) / rows))  # under noise it may lie outside
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
        return self._longer(more, 0)

    def joined(self, more: int) -> Tally:
        """With `more` silos that have tried nothing."""
        longer = self._longer(more, 1)
        return replace(longer, present=None, before=None)

    def _longer(self, more: int, dim: int) -> Tally:
        def longer(t: Tensor) -> Tensor:
            shape = (more, t.shape[1]) if dim == 0 else (t.shape[0], more)
            return torch.cat([t, torch.zeros(shape, dtype=t.dtype)], dim)

        releases = None if self.releases is None else longer(self.releases)
        return replace(
            self, sums=longer(self.sums), squares=longer(self.squares), counts=longer(self.counts),
            reached=longer(self.reached), ended=longer(self.ended), releases=releases,
        )  # fmt: skip

    def _heard(self, t: Tensor) -> Tensor:
        return t if self.present is None else t[..., self.present]


def folded(known: Tally, wants: Mapping[int, int], replies: Sequence[tuple[int, Any]]) -> Tally:
    """With what silos replied that were asked for these candidates up to these rows, each from where it was, in the order of
    `wants`. A silo that did not reply is still where it was; so is one that could tell of more rows than it was asked for."""
    some = list(wants)
    sums, squares, counts = known.sums.clone(), known.squares.clone(), known.counts.clone()
    reached, ended = known.reached.clone(), known.ended.clone()
    releases = None if known.releases is None else known.releases.clone()
    for silo, tried in replies:
        sums[some, silo] += tried.sums
        counts[some, silo] += tried.counts
        if len(tried.squares):
            squares[some, silo] += tried.squares
        if releases is not None:
            releases[some, silo] += (tried.counts > 0).long()
        for i, (c, end) in enumerate(wants.items()):
            begin, count = int(known.reached[c, silo]), int(tried.counts[i])
            if count < end - begin and not (tried.more and tried.more[i]):
                ended[c, silo], reached[c, silo] = True, begin + count
            elif count or end - begin >= tried.least:  # of so many it says nothing only where it has told of them before
                reached[c, silo] = end
            if tried.unfit[i]:
                ended[c] = True
    return replace(
        known, sums=sums, squares=squares, counts=counts, reached=reached, ended=ended, releases=releases
    )


def empty(silos: int, noise: float = 0.0) -> Tally:
    blank = torch.zeros(0, silos, dtype=torch.float64)
    counts = torch.zeros(0, silos, dtype=torch.int64)
    return Tally(
        blank, blank.clone(), counts, counts.clone(), torch.zeros(0, silos, dtype=torch.bool), noise,
        counts.clone() if noise else None,
    )  # fmt: skip
