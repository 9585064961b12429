"""How calls are spread: by hand, as properties, and against trying everything on scores that are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import bandits
from fedtailor.errors import UserError
from fedtailor.privacy import Noise
from fedtailor.tally import Tally, empty, folded
from judged import told

ROWS = 120


class Table:
    """Scores that are known, (candidates, silos, rows): what silos would say, and how often they were asked."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores, self.known, self.exchanges = scores, empty(scores.shape[1]).grown(len(scores)), 0

    def attempt(self, wants: Mapping[int, int]) -> Tally:
        self.exchanges += 1
        replies = []
        for silo in range(self.scores.shape[1]):
            some = [self.scores[c, silo, int(self.known.asked[c]) : end] for c, end in wants.items()]
            sums, squares = [float(s.sum()) for s in some], [float(s.square().sum()) for s in some]
            replies.append((silo, told(sums, squares, [len(s) for s in some])))
        self.known = folded(self.known, wants, replies)
        return self.known


def level_of(asked: list[int], calls: int, least: int = 1) -> dict[int, int]:
    known = empty(1).grown(len(asked))
    known.reached[:, 0] = torch.tensor(asked)
    return bandits.leveled(known, range(len(asked)), calls, least)


def test_those_behind_catch_up_first() -> None:
    assert level_of([0, 0], 10) == {0: 5, 1: 5}
    assert level_of([0, 100], 10) == {0: 10}
    assert level_of([0, 4, 100], 10) == {0: 7, 1: 7}
    assert level_of([2, 4], 10) == {0: 8, 1: 8}
    assert level_of([0, 0, 0], 2) == {}
    assert level_of([0, 0], 10, least=6) == {}


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 300))
def test_a_level_spends_no_more_than_there_is(asked: list[int], calls: int) -> None:
    wants = level_of(asked, calls)
    spent = sum(end - asked[c] for c, end in wants.items())
    assert spent <= calls
    assert spent > calls - len(asked) or calls < len(asked)  # nor less than whole rows allow
    assert len(set(wants.values())) <= 1
    assert all(asked[c] >= min(wants.values(), default=0) for c in range(len(asked)) if c not in wants)


def bernoulli(seed: int, best: float = 0.75, others: float = 0.55) -> torch.Tensor:
    """12 candidates, 3 silos: one is better."""
    dice = torch.Generator().manual_seed(seed)
    rates = torch.full((12, 3, ROWS), others)
    rates[seed % 12] = best
    return torch.bernoulli(rates, generator=dice)


@pytest.mark.parametrize("how", [bandits.halving, bandits.ucb])
def test_a_third_of_the_calls_finds_the_same_winner(how: bandits.Bandit) -> None:
    """Or one within its interval: over 20 drawn tables, where trying everything costs 12 x 120 calls a silo."""
    for seed in range(20):
        everything = Table(bernoulli(seed))
        winner = bandits.exhaustive(everything.known, range(12), 0, 1, everything.attempt)[0]
        assert bandits.spent(everything.known) == 12 * ROWS
        few = Table(bernoulli(seed))
        found = how(few.known, range(12), 12 * ROWS // 3, 1, few.attempt)[0]
        assert bandits.spent(few.known) <= 12 * ROWS // 3
        apart = (bernoulli(seed)[winner] - bernoulli(seed)[found]).flatten()
        half = 1.96 * float(apart.std()) / len(apart) ** 0.5
        assert float(apart.mean()) <= half, (seed, winner, found)


def same_winner(how: bandits.Bandit, seed: int, calls: int) -> bool:
    few = Table(bernoulli(seed, 0.85, 0.5))
    return how(few.known, range(12), calls, 1, few.attempt)[0] == seed % 12


@pytest.mark.parametrize("how", [bandits.halving, bandits.ucb])
def test_a_clear_winner_is_found_with_a_tenth(how: bandits.Bandit) -> None:
    assert sum(same_winner(how, seed, 144) for seed in range(20)) >= 18


def test_halving_asks_once_a_halving_and_leaves_the_worst_early() -> None:
    table = Table(bernoulli(0))
    bandits.halving(table.known, range(12), 480, 1, table.attempt)
    assert table.exchanges == 4  # 12, 6, 3, 2
    rows = sorted(table.known.asked.tolist())
    assert rows[0] == 480 // 4 // 12
    assert rows[-1] > 5 * rows[0]


def test_what_was_dropped_early_stays_below() -> None:
    """Rows at the front are lucky ones: whoever saw no others has the higher mean."""
    scores = bernoulli(0)
    scores[:, :, :10] = 1.0
    table = Table(scores)
    order = bandits.halving(table.known, range(12), 480, 1, table.attempt)
    rows = [int(table.known.counts[c].sum()) for c in order]
    assert rows == sorted(rows, reverse=True)
    assert sorted(order) == list(range(12))
    assert order != bandits.by_mean(table.known, range(12))


def test_ucb_ranks_by_lower_bounds() -> None:
    table = Table(bernoulli(0))
    order = bandits.ucb(table.known, range(12), 480, 1, table.attempt)
    lower = table.known.lower()[order].tolist()
    assert lower == sorted(lower, reverse=True)


def test_halving_goes_on_where_earlier_rounds_left_off() -> None:
    table = Table(bernoulli(0))
    table.attempt({0: 60, 1: 60})
    bandits.halving(table.known, range(4), 40, 1, table.attempt)
    assert table.known.asked.tolist()[:2] == [60, 60]  # the new ones caught up
    assert min(table.known.asked.tolist()[2:4]) >= 10


@pytest.mark.parametrize("how", [bandits.halving, bandits.ucb, bandits.exhaustive])
def test_rows_that_are_used_up_end_it(how: bandits.Bandit) -> None:
    table = Table(bernoulli(0)[:3, :, :10])
    how(table.known, range(3), 10_000, 1, table.attempt)
    assert table.known.counts.max() == 10
    assert table.known.over.any()


def test_one_candidate_is_no_problem() -> None:
    for how in (bandits.halving, bandits.ucb, bandits.exhaustive):
        table = Table(bernoulli(0)[:1])
        assert how(table.known, [0], 16, 1, table.attempt) == [0]


def test_bandits_are_found_by_name() -> None:
    assert bandits.names() == {"halving", "ucb", "exhaustive"}
    found: Callable[..., Tally] = bandits.find("ucb")
    assert found is bandits.ucb
    with pytest.raises(UserError, match=r"method.bandit = 'halvin'.*did you mean 'halving'"):
        bandits.find("halvin")


def test_finalists_are_tried_on_the_same_rows() -> None:
    table = Table(bernoulli(0))
    table.attempt({0: 30, 1: 10, 2: 20})
    bandits.confirm(table.known, [0, 1, 2], 60, 1, table.attempt)
    assert table.known.asked.tolist()[:3] == [40, 40, 40]
    assert bandits.by_mean(table.known, [5, 0, 1, 2])[-1] == 5


class Noisy(Table):
    """As the silos of such a table would say it under Laplace noise of this scale."""

    def __init__(self, scores: torch.Tensor, scale: float, seed: int) -> None:
        super().__init__(scores)
        self.known = empty(scores.shape[1], 2 * scale**2).grown(len(scores))
        self.noise, self.dice = Noise("laplace", scale, 1.0), random.Random(seed)

    def attempt(self, wants: Mapping[int, int]) -> Tally:
        self.exchanges += 1
        replies = []
        for silo in range(self.scores.shape[1]):
            some = [self.scores[c, silo, int(self.known.asked[c]) : end] for c, end in wants.items()]
            sums = self.noise.on(torch.tensor([float(s.sum()) for s in some], dtype=torch.float64), self.dice.getrandbits(32))
            replies.append((silo, told(sums.tolist(), [], [len(s) for s in some])))
        self.known = folded(self.known, wants, replies)
        return self.known


def test_under_noise_a_pull_is_as_large_as_its_noise_asks_for() -> None:
    """4 rows for each unit of its variance: then a row's own variance is no smaller. Else noise chooses the winner."""
    found = 0
    for seed in range(40):
        few = Noisy(bernoulli(seed, 0.8, 0.55), 4.0, seed)  # variance 32
        winner = bandits.ucb(few.known, range(12), 12 * ROWS // 3, 1, few.attempt)[0]
        assert few.known.releases is not None
        pulls = few.known.counts.sum() / few.known.releases.sum()
        assert float(pulls) >= 30
        found += winner == seed % 12
    assert found >= 29  # 25 by pulls as without noise
