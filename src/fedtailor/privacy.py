"""Noise on sums that leave a silo, and what it costs: pure functions, called inside the silo.

Neighbours are two data sets that differ in one row's content (the number of rows is known). A sum of scores in [0, 1]
then changes by at most 1, and a row that is in `releases` of the released sums changes all of them at once:

    laplace   epsilon = releases / scale                                        (Dwork et al. 2006; composition adds up)
    gaussian  rho = releases / (2 scale^2), epsilon = rho + 2 sqrt(rho ln(1/delta))     (zCDP: Bun & Steinke 2016)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

Kind = Literal["none", "laplace", "gaussian"]
NOISY = ("laplace", "gaussian")


@dataclass(frozen=True)
class Noise:
    """What a silo adds to each sum, and the most that it may have told of one row once it has answered."""

    kind: Kind = "none"
    scale: float = 0.0  # Laplace's b or the standard deviation, in units of one row's score
    epsilon: float = math.inf
    delta: float = 0.0

    @property
    def variance(self) -> float:
        return {"none": 0.0, "laplace": 2 * self.scale**2, "gaussian": self.scale**2}[self.kind]

    @property
    def cost(self) -> float:
        """Of one sum, for each row in it; costs add up: epsilon of Laplace noise, rho of Gaussian noise."""
        return 1 / self.scale if self.kind == "laplace" else 1 / (2 * self.scale**2)

    def spent(self, releases: int) -> float:
        """Epsilon of a row that is in this many sums; smaller is more private."""
        if self.kind == "none":
            return math.inf if releases else 0.0
        whole = torch.tensor(releases * self.cost, dtype=torch.float64)
        none = torch.zeros((), dtype=torch.float64)
        pair = (whole, none) if self.kind == "laplace" else (none, whole)
        return float(together(*pair, self.delta))

    def problem(self) -> str | None:
        """Why this is no noise that can be accounted for, or None."""
        if self.kind not in NOISY:
            return f"noise = {self.kind!r}: no such noise (choices: {', '.join(NOISY)})"
        if not 0 < self.scale < math.inf or not self.epsilon > 0:
            return f"noise of scale {self.scale!r} and epsilon {self.epsilon!r}: both must be above 0"
        if self.kind == "gaussian" and not 0 < self.delta < 1:
            return f"delta = {self.delta!r} must lie between 0 and 1"
        return None

    def on(self, sums: Tensor, seed: int | None) -> Tensor:
        """The sums (fp64) with fresh noise on each; `seed` None draws from the operating system's randomness."""
        if self.kind == "none":
            return sums
        dice = numpy.random.default_rng(seed)
        draw = dice.laplace if self.kind == "laplace" else dice.normal
        return sums + torch.from_numpy(draw(0.0, self.scale, tuple(sums.shape)))


def together(epsilon: Tensor, rho: Tensor, delta: float) -> Tensor:
    """Epsilon, at `delta`, of what was told under Laplace noise of `epsilon` and Gaussian noise of `rho`, element by element."""
    return epsilon + rho + 2 * (rho * math.log(1 / delta)).sqrt() if bool((rho > 0).any()) else epsilon


def noise(kind: Kind, epsilon: float, delta: float, releases: int) -> Noise:
    """The least noise by which a row that is in `releases` sums costs at most `epsilon` (at `delta`, if Gaussian)."""
    if kind == "none":
        return Noise()
    if kind == "laplace":
        return Noise(kind, releases / epsilon, epsilon)
    root = math.log(1 / delta)  # rho + 2 sqrt(rho root) = epsilon, solved for sqrt(rho)
    rho = (math.sqrt(root + epsilon) - math.sqrt(root)) ** 2
    return Noise(kind, math.sqrt(releases / (2 * rho)), epsilon, delta)
