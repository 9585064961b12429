"""Candidate prompts tried on a silo's own rows. Texts of the server's go down; sums of scores come back, nothing else.

A row's score lies in [0, 1], higher is better. "probability": of the right label among the labels; where text is
written, of a token of the right answer (its geometric mean). "accuracy": 1 where the right label is the likeliest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedtailor import wire
from fedtailor.core import Silo, in_silo
from fedtailor.data import Row
from fedtailor.errors import SiloError
from fedtailor.models import Resident
from fedtailor.prefixes import Prefixes
from fedtailor.privacy import Noise
from fedtailor.prompts import Prompt, opened, unfit

Score = Literal["probability", "accuracy"]
TOGETHER = 64  # silos whose rows are scored in one go
GRID = 2.0**24  # scores are multiples of 1 / GRID: their sums in fp64 are exact, whoever adds them in whatever order
SLACK = 1e-9


@dataclass(frozen=True)
class Try:
    """Down: candidates, and of each from which to which of its rows a silo tries it. No secret of the server's."""

    prompts: tuple[Prompt, ...]
    windows: tuple[tuple[int, int], ...]  # places in the order in which `order` and the silo's name shuffle its rows
    order: int
    score: Score = "probability"
    minimum: int = 1  # rows in a sum, below which a silo says nothing; its own `minimum` counts where it is larger
    noise: Noise = field(default_factory=Noise)
    repeatable: bool = False  # noise from the silo's seed, which the server knows: for trying out


@dataclass(frozen=True)
class Tried:
    """Up: of each candidate the sum of its rows' scores, of their squares (none under noise), and how many they are.

    Leaves out rows, answers and single scores: no sum is over fewer rows than the minimum.
    """

    sums: Tensor  # (candidates,) fp64
    squares: Tensor  # the same, or (0,) under noise: another number of each row's would cost more of its epsilon
    counts: Tensor  # (candidates,) int64
    unfit: tuple[bool, ...]  # whether some row of the silo's does not fit the model's context with it
    epsilon: float = 0.0  # spent so far, of the row that has told most; inf without noise is written as 0

    def problem(self, asked: Try) -> str | None:
        """Why these sums must not be used, or None."""
        n = len(asked.prompts)
        wide = 0 if asked.noise.kind != "none" else n
        if self.sums.shape != (n,) or self.counts.shape != (n,) or self.squares.shape != (wide,) or len(self.unfit) != n:
            return f"sums of {len(self.sums)} candidates, asked {n}"
        if self.sums.dtype != torch.float64 or self.squares.dtype != torch.float64 or self.counts.dtype != torch.int64:
            return f"sums are {self.sums.dtype}, counts {self.counts.dtype}: asked float64 and int64"
        if (bad := wire.not_finite(self)) is not None:
            return f"{bad} is not finite"
        most = torch.tensor([end - begin for begin, end in asked.windows])
        if bool((self.counts < 0).any()) or bool((self.counts > most).any()):
            return "more rows than asked, or fewer than none"
        if wide and not bool(((self.squares >= 0) & (self.squares <= self.sums + SLACK) & (self.sums <= self.counts)).all()):
            return "sums of scores in [0, 1] are out of bounds"
        return None


def try_many(silos: Sequence[Silo], body: Try) -> list[Tried]:
    """Many silos in one go: rows are scored in shared batches, and added up apart."""
    if any(silo.data.labels != silos[0].data.labels for silo in silos):  # [silo.NAME] may ask another question
        return [try_many([silo], body)[0] for silo in silos]
    resident, labels = silos[0].models["base"], silos[0].data.labels
    if any(prompt.words and len(prompt.words) != len(labels) for prompt in body.prompts):
        raise SiloError(f"a prompt's words do not stand for the {len(labels)} labels of this silo")
    orders = [_order(silo, body.order) for silo in silos]
    least = [max(body.minimum, int(silo.data.settings.get("minimum", 1))) for silo in silos]
    for silo, minimum in zip(silos, least, strict=True):
        if len(silo.data.train) < minimum:
            raise SiloError(f"fewer rows than the minimum of {minimum}: it says nothing of so few")
    prefixes = Prefixes()
    sums = torch.zeros(3, len(silos), len(body.prompts), dtype=torch.float64)
    unfits = [[False] * len(body.prompts) for _ in silos]
    used: list[list[list[int]]] = [[] for _ in silos]
    for c, (prompt, (begin, end)) in enumerate(zip(body.prompts, body.windows, strict=True)):
        chosen: list[list[int]] = []
        for s, silo in enumerate(silos):
            every = (*silo.data.train, *silo.data.val, *silo.data.test)
            # a candidate is measured against all rows when it first comes: what is served must fit them all
            unfits[s][c] = begin == 0 and unfit(resident, prompt, every, labels) is not None
            window = [] if unfits[s][c] else sorted(orders[s][begin:end])
            chosen.append(window if len(window) >= least[s] else [])
        together = [silo.data.train[i] for silo, some in zip(silos, chosen, strict=True) for i in some]
        scores = scored(resident, prompt, labels, together, body.score, prefixes)
        for s, some in enumerate(chosen):
            mine, scores = scores[: len(some)], scores[len(some) :]
            sums[:, s, c] = torch.stack([mine.sum(), _gridded(mine.square()).sum(), torch.tensor(float(len(some)))])
            used[s].append(some)
    return [_told(silo, body, sums[:, s], unfits[s], used[s]) for s, silo in enumerate(silos)]


try_many.together = TOGETHER  # type: ignore[attr-defined]


@in_silo(cohort=try_many)
def attempt(silo: Silo, body: Try) -> Tried:
    return try_many([silo], body)[0]


def scored(
    resident: Resident, prompt: Prompt, labels: Sequence[str], rows: Sequence[Row], score: Score, prefixes: Prefixes
) -> Tensor:
    """(rows,) scores under one prompt, fp64, multiples of 1 / GRID."""
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    model = opened(resident, prompt, labels, prefixes)
    if not labels:
        likely = torch.tensor([total / max(places, 1) for total, places in model.logprobs(rows)], dtype=torch.float64)
        return _gridded(likely.exp())
    found = model.scores(rows, labels)
    true = torch.tensor([labels.index(row.answer) for row in rows])
    if score == "accuracy":
        return (found.argmax(1) == true).double()
    return _gridded(found.double().softmax(1).gather(1, true[:, None])[:, 0])


def _told(silo: Silo, body: Try, sums: Tensor, unfits: list[bool], used: list[list[int]]) -> Tried:
    totals, squares, counts = sums[0], sums[1], sums[2].long()
    if body.noise.kind == "none":
        return Tried(totals.clone(), squares.clone(), counts, tuple(unfits))
    releases = silo.memory.get("releases", torch.zeros(len(silo.data.train), dtype=torch.int64)).clone()
    for some in used:
        releases[torch.tensor(some, dtype=torch.long)] += 1
    epsilon = body.noise.spent(int(releases.max()))
    allowed = min(body.noise.epsilon, float(silo.data.settings.get("epsilon", body.noise.epsilon)))
    if epsilon > allowed * (1 + SLACK):
        raise SiloError(f"it would spend epsilon = {epsilon:.3g} of some row, more than {allowed:.3g}: it says no more")
    silo.memory["releases"] = releases
    seed = silo.seed if body.repeatable else None
    noisy = torch.where(counts > 0, body.noise.on(totals, seed), 0.0)  # of no row at all there is nothing to hide
    return Tried(noisy, torch.zeros(0, dtype=torch.float64), counts, tuple(unfits), epsilon)


def _order(silo: Silo, order: int) -> list[int]:
    """The silo's rows, shuffled: the same for every candidate, so that candidates are compared on the same rows."""
    places = list(range(len(silo.data.train)))
    random.Random(f"{order}/{silo.name}").shuffle(places)
    return places


def _gridded(scores: Tensor) -> Tensor:
    return (scores * GRID).round() / GRID
