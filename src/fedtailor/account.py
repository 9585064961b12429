"""A silo's account of what it has told of its rows in a run: what noise it was told under, and of which rows of each prompt.

It lies in the memory under `limits.TOLD`, which no changed request, no abandoned round and no restart takes back: what has
left has left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedtailor import privacy
from fedtailor.core import Silo
from fedtailor.errors import SiloError
from fedtailor.limits import TOLD, Limits
from fedtailor.privacy import Noise
from fedtailor.prompts import Prompt

SLACK = 1e-9


@dataclass
class Account:
    """A copy, until it is `kept`."""

    spent: dict[str, Tensor]  # noise -> (training rows,) fp64: epsilon of Laplace noise, rho of Gaussian noise
    windows: dict[str, list[list[int]]]  # a prompt's digest -> from which to which of its rows it was told of
    order: int | None  # in which windows count the rows

    @classmethod
    def of(cls, silo: Silo) -> Account:
        found = silo.memory.get(TOLD, {})
        none = torch.zeros(len(silo.data.train), dtype=torch.float64)
        spent = {kind: found.get("spent", {}).get(kind, none).clone() for kind in privacy.NOISY}
        windows = {key: [list(window) for window in some] for key, some in found.get("windows", {}).items()}
        return cls(spent, windows, found.get("order"))

    def kept(self, silo: Silo) -> None:
        spent = {kind: costs for kind, costs in self.spent.items() if bool(costs.any())}
        silo.memory[TOLD] = {"spent": spent, "windows": self.windows, "order": self.order}

    def ordered(self, order: int) -> None:
        """Raises SiloError for another order than before: windows of two orders overlap in any number of rows."""
        if self.order not in (None, order):
            raise SiloError("its rows were asked for in another order before in this run: begin a new run")
        self.order = order

    def knows(self, prompt: Prompt) -> bool:
        return _digest(prompt) in self.windows

    def untold(self, prompt: Prompt, begin: int, end: int, least: int, noisy: bool) -> tuple[int, int]:
        """The part of a window that may be told: all of it where no difference of it and earlier ones of this prompt is a sum
        over fewer than `least` rows, and no noise is drawn anew; else the rows behind all that was told."""
        before = self.windows.get(_digest(prompt), [])
        cuts = sorted({begin, end, *(place for window in before for place in window)})
        if not noisy and all(after - place >= least for place, after in pairwise(cuts)):
            return begin, end
        begin = max([begin, *(last for _, last in before)])
        return begin, max(begin, end)

    def tell(self, prompt: Prompt, begin: int, end: int) -> None:
        before = self.windows.setdefault(_digest(prompt), [])
        if [begin, end] not in before:
            before.append([begin, end])

    def pay(self, noise: Noise, used: Sequence[Sequence[int]], limits: Limits) -> float:
        """Epsilon of the row that has told most once these sums, over these rows, have left. Raises SiloError where that is
        more than is allowed."""
        for some in used:
            self.spent[noise.kind][torch.tensor(some, dtype=torch.long)] += noise.cost
        delta = noise.delta if noise.kind == "gaussian" else limits.delta
        epsilon = float(privacy.together(self.spent["laplace"], self.spent["gaussian"], delta).max())
        allowed = min(noise.epsilon, limits.epsilon)
        if epsilon > allowed * (1 + SLACK):
            raise SiloError(f"it would spend epsilon = {epsilon:.3g} of some row, more than {allowed:.3g}: it says no more")
        return epsilon


def _digest(prompt: Prompt) -> str:
    text = json.dumps([prompt.template, prompt.words, prompt.examples])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
