"""Candidate prompts tried on a silo's own rows. Texts of the server's go down; sums of scores come back, nothing else.

A row's score lies in [0, 1], higher is better. "probability": of the right label among the labels; where text is
written, of a token of the right answer (its geometric mean). "accuracy": 1 where the right label is the likeliest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedtailor import limits, wire
from fedtailor.account import SLACK, Account
from fedtailor.core import Silo, in_silo
from fedtailor.data import Row
from fedtailor.errors import SiloError
from fedtailor.limits import Limits
from fedtailor.models import Resident
from fedtailor.prefixes import Prefixes
from fedtailor.privacy import Noise
from fedtailor.prompts import Prompt, opened, unfit

Score = Literal["probability", "accuracy"]
TOGETHER = 64  # silos whose rows are scored in one go
GRID = 2.0**24  # scores are multiples of 1 / GRID: their sums in fp64 are exact, whoever adds them in whatever order
FAR = 40  # scales: noise goes further less often than once in 10^17 sums


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

    Leaves out rows, answers and single scores: no sum is over fewer rows than the minimum. Without noise, `unfit` is about
    all rows, and so may tell that one of them is long; under noise it is about those of validation and test.
    """

    sums: Tensor  # (candidates,) fp64
    squares: Tensor  # the same, or (0,) under noise: another number of each row's would cost more of its epsilon
    counts: Tensor  # (candidates,) int64
    unfit: tuple[bool, ...]  # whether some row of the silo's does not fit the model's context with it
    epsilon: float = 0.0  # spent so far, of the row that has told most; inf without noise is written as 0
    more: tuple[bool, ...] = ()  # whether it could tell of rows all the same where these are fewer than asked; (): nowhere
    least: int = 1  # rows, below which it says nothing

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
        if len(self.more) not in (0, n) or type(self.least) is not int or self.least < 1:
            return f"{len(self.more)} flags and a minimum of {self.least!r}, asked {n} flags"
        most = torch.tensor([end - begin for begin, end in asked.windows])
        if bool((self.counts < 0).any()) or bool((self.counts > most).any()):
            return "more rows than asked, or fewer than none"
        if wide and not bool(((self.squares >= 0) & (self.squares <= self.sums + SLACK) & (self.sums <= self.counts)).all()):
            return "sums of scores in [0, 1] are out of bounds"
        if not wide and bool((self.sums.abs() > torch.where(self.counts > 0, self.counts + FAR * asked.noise.scale, 0.0)).any()):
            return f"sums are further from scores in [0, 1] than noise of scale {asked.noise.scale:.3g} takes them"
        if not wide and not 0 <= self.epsilon <= asked.noise.epsilon * (1 + SLACK):
            return f"epsilon = {self.epsilon} is not between 0 and {asked.noise.epsilon:g}"
        return None


def try_many(silos: Sequence[Silo], body: Try) -> list[Tried]:
    """Many silos in one go: rows are scored in shared batches, and added up apart."""
    if any(silo.data.labels != silos[0].data.labels for silo in silos):  # [silo.NAME] may ask another question
        return [try_many([silo], body)[0] for silo in silos]
    resident, labels = silos[0].models["base"], silos[0].data.labels
    if any(prompt.words and len(prompt.words) != len(labels) for prompt in body.prompts):
        raise SiloError(f"a prompt's words do not stand for the {len(labels)} labels of this silo")
    if any(not 0 <= begin <= end for begin, end in body.windows) or len(body.windows) != len(body.prompts):
        raise SiloError(f"windows {str(body.windows)[:100]}: not one for each prompt, from a row to a later one")
    some = [_Trying.of(silo, body) for silo in silos]
    prefixes = Prefixes()
    for c, prompt in enumerate(body.prompts):
        chosen = [one.chosen(c) for one in some]
        together = [one.silo.data.train[i] for one, rows in zip(some, chosen, strict=True) for i in rows]
        scores = fitting(resident, prompt, labels, together, body.score, prefixes)
        for one, rows in zip(some, chosen, strict=True):
            mine, scores = scores[: len(rows)], scores[len(rows) :]
            one.add(c, rows, mine)
    return [one.told() for one in some]


try_many.together = TOGETHER  # type: ignore[attr-defined]


@in_silo(cohort=try_many)
def attempt(silo: Silo, body: Try) -> Tried:
    return try_many([silo], body)[0]


@dataclass
class _Trying:
    """One silo's part of it, candidate by candidate."""

    silo: Silo
    body: Try
    limits: Limits
    account: Account
    order: list[int]
    sums: Tensor  # (3, candidates) fp64: of scores, of their squares, of rows
    unfit: list[bool]
    more: list[bool]
    used: list[list[int]] = field(default_factory=list)  # of each candidate the rows in its sum

    @classmethod
    def of(cls, silo: Silo, body: Try) -> _Trying:
        """Raises SiloError where it may say nothing at all."""
        own, n = limits.of(silo.data), len(body.prompts)
        own = replace(own, minimum=max(own.minimum, body.minimum))
        limits.check(body.noise, own)
        if len(silo.data.train) < own.minimum:
            raise SiloError(f"fewer rows than the minimum of {own.minimum}: it says nothing of so few")
        account = Account.of(silo)
        account.ordered(body.order)
        order = _order(silo, body.order)
        return cls(silo, body, own, account, order, torch.zeros(3, n, dtype=torch.float64), [False] * n, [False] * n)

    @property
    def noisy(self) -> bool:
        return self.body.noise.kind != "none"

    def chosen(self, c: int) -> list[int]:
        """The rows that this candidate is to be tried on: none where it does not fit, or where they are too few."""
        prompt, (first, last) = self.body.prompts[c], self.body.windows[c]
        self.unfit[c] = not self.account.knows(prompt) and not self._fits(prompt)
        if self.unfit[c]:
            return []
        size = len(self.order)
        begin, end = self.account.untold(prompt, min(first, size), min(last, size), self.limits.minimum, self.noisy)
        rows = sorted(self.order[begin:end])
        if len(rows) < self.limits.minimum:
            self.more[c] = first < last and size - begin >= self.limits.minimum
            return []
        self.more[c] = len(rows) < last - first and size > end
        self.account.tell(prompt, begin, end)
        return rows

    def add(self, c: int, rows: list[int], scores: Tensor) -> None:
        """`scores` are NaN where a row does not fit, which no flag may tell under noise: it is as wrong as a row can be."""
        if not self.noisy and bool(scores.isnan().any()):
            self.unfit[c], self.more[c], rows, scores = True, False, [], scores[:0]
        scores = scores.nan_to_num(0.0)
        count = torch.tensor(float(len(rows)))
        self.sums[:, c] = torch.stack([scores.sum(), _gridded(scores.square()).sum(), count])
        self.used.append(rows)

    def told(self) -> Tried:
        """What leaves; the account of it is in the silo's memory then."""
        sums, squares, counts = self.sums[0].clone(), self.sums[1].clone(), self.sums[2].long()
        epsilon = 0.0
        if self.noisy:
            epsilon = self.account.pay(self.body.noise, self.used, self.limits)
            seed = self.silo.seed if self.body.repeatable else None
            sums = torch.where(counts > 0, self.body.noise.on(sums, seed), 0.0)  # of no row there is nothing to hide
            squares = squares[:0]
        self.account.kept(self.silo)
        more = tuple(self.more) if any(self.more) else ()
        return Tried(sums, squares, counts, tuple(self.unfit), epsilon, more, self.limits.minimum)

    def _fits(self, prompt: Prompt) -> bool:
        """All rows where it first comes: what is served must fit them all. Under noise not those that train, of which no
        more may leave than the account knows of."""
        data = self.silo.data
        rows = (*([] if self.noisy else data.train), *data.val, *data.test)
        return unfit(self.silo.models["base"], prompt, (Row("", ""), *rows), data.labels) is None


def fitting(
    resident: Resident, prompt: Prompt, labels: Sequence[str], rows: Sequence[Row], score: Score, prefixes: Prefixes
) -> Tensor:
    """As `scored`, NaN for a row that does not fit the model's context so."""
    try:
        return scored(resident, prompt, labels, rows, score, prefixes)
    except SiloError:
        half = len(rows) // 2
        if not half:
            return torch.full((len(rows),), torch.nan, dtype=torch.float64)
        return torch.cat([fitting(resident, prompt, labels, some, score, prefixes) for some in (rows[:half], rows[half:])])


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


def _order(silo: Silo, order: int) -> list[int]:
    """The silo's rows, shuffled: the same for every candidate, so that candidates are compared on the same rows."""
    places = list(range(len(silo.data.train)))
    random.Random(f"{order}/{silo.name}").shuffle(places)
    return places


def _gridded(scores: Tensor) -> Tensor:
    return (scores * GRID).round() / GRID
