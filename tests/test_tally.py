"""Means, errors and intervals from sums, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedtailor.tally import Tally, empty, folded
from judged import told


def two_silos() -> Tally:
    """Candidate 0: scores 1, 1, 0, 0 in one silo and 1, 0 in the other; candidate 1: 1, 1, 1, 1 in the first alone."""
    known = empty(2).grown(2)
    return folded(known, {0: 4, 1: 4}, [(0, told([2, 4], [2, 4], [4, 4])), (1, told([1, 0], [1, 0], [2, 0]))])


def test_a_mean_is_that_of_the_silos_that_tried() -> None:
    assert two_silos().mean().tolist() == [0.5, 1.0]
    assert empty(2).grown(1).mean().tolist() == [-math.inf]
    assert empty(2).grown(1).error().tolist() == [math.inf]


def test_an_error_by_hand() -> None:
    """Squared deviations 1 and 1/2 over 4 and 2 rows, one more row of variance 1/4 each: 1.25 / 4 and 0.75 / 2."""
    assert two_silos().variance()[0].tolist() == pytest.approx([1.25 / 4, 0.75 / 2])
    assert two_silos().error()[0].item() == pytest.approx(math.sqrt(1.25 / 16 + 0.75 / 4) / 2)
    assert two_silos().lower()[1].item() == pytest.approx(1 - 2 * math.sqrt(0.25 / 16))
    assert empty(2).grown(1).lower().tolist() == [-math.inf]


def test_an_interval_by_hand() -> None:
    """25 of 100 right: 0.25, variance (18.75 + 0.25) / 100; an interval ends where scores do."""
    known = folded(empty(1).grown(2), {0: 100, 1: 2}, [(0, told([25, 1], [25, 1], [100, 2]))])
    half = 1.959964 * math.sqrt(0.19 / 100)
    assert known.interval(0, 0) == pytest.approx((0.25, 0.25 - half, 0.25 + half, 100))
    assert known.interval(1, 0) == (0.5, 0.0, 1.0, 2)
    assert known.counts.tolist() == [[100], [2]]
    assert two_silos().interval(1, 1)[3] == 0


def test_the_rows_a_silo_lacks_end_a_candidate_for_it() -> None:
    known = two_silos()
    assert known.asked.tolist() == [4, 4]
    assert known.over.tolist() == [False, False]  # the first silo had all four
    known = folded(known, {0: 8}, [(0, told([1], [1], [2])), (1, told([0], [0], [0]))])
    assert known.over.tolist() == [True, False]
    assert known.asked.tolist() == [6, 4]
    assert known.counts.tolist() == [[6, 2], [4, 0]]


def test_a_candidate_that_fits_not_everywhere_is_over() -> None:
    known = folded(empty(1).grown(1), {0: 3}, [(0, told([3], [3], [3], [True]))])
    assert known.over.tolist() == [True]


def test_luck_on_few_rows_wins_nothing() -> None:
    known = folded(empty(1).grown(3), {0: 80, 1: 2, 2: 80}, [(0, told([50, 2, 60], [50, 2, 60], [80, 2, 80]))])
    assert known.mean().tolist() == [0.625, 1.0, 0.75]
    assert known.best([0, 1, 2]) == 2
    assert known.best([1]) == 1
    even = folded(empty(1).grown(2), {0: 4, 1: 4}, [(0, told([2, 2], [2, 2], [4, 4]))])
    assert even.best([0, 1]) == 0  # the first of equals


def test_a_new_one_that_is_clearly_better_wins_on_fewer_rows() -> None:
    known = folded(empty(1).grown(2), {0: 400, 1: 80}, [(0, told([250, 64], [250, 64], [400, 80]))])
    assert known.best([0, 1]) == 1


def test_on_the_same_rows_the_mean_decides() -> None:
    """Not the error: 0.6 of scores all alike against 0.61 of scores far apart."""
    known = folded(empty(1).grown(2), {0: 40, 1: 40}, [(0, told([24.0, 24.4], [14.4, 24.4], [40, 40]))])
    assert known.error()[0] < known.error()[1] - 0.01
    assert known.best([0, 1]) == 1


def test_noise_widens() -> None:
    """Noise of variance 32 in each of two sums over 8 rows in all: 64 / 64 more in the variance of the mean, and m (1 - m)
    for the variance that squares would tell."""
    known = empty(1, 32.0).grown(1)
    for _ in range(2):
        known = folded(known, {0: int(known.asked[0]) + 4}, [(0, told([2.0], [], [4]))])
    assert known.releases is not None
    assert known.releases.tolist() == [[2]]
    assert known.error()[0].item() == pytest.approx(math.sqrt(0.25 / 8 + 1.0))
    low, high = known.interval(0, 0)[1:3]
    assert (low, high) == (0.0, 1.0)


def test_more_candidates_change_nothing_of_the_others() -> None:
    known = two_silos().grown(2)
    assert known.mean().tolist() == [0.5, 1.0, -math.inf, -math.inf]
    assert known.asked.tolist() == [4, 4, 0, 0]


def test_each_silo_is_where_it_is() -> None:
    """Silo 1 misses an exchange: the candidate is behind as long as it is, and silo 0 alone is not."""
    known = folded(empty(2).grown(1), {0: 8}, [(0, told([4], [4], [8]))])
    assert known.reached.tolist() == [[8, 0]]
    assert known.asked.tolist() == [0]
    assert known.begun([0]).asked.tolist() == [8]
    known = folded(known, {0: 8}, [(1, told([4], [4], [5]))])
    assert known.asked.tolist() == [8]
    assert known.ended.tolist() == [[False, True]]
    assert known.over.tolist() == [False]
    assert known.begun([1]).over.tolist() == [True]


def test_a_silo_that_would_tell_of_more_rows_is_where_it_was() -> None:
    declining = replace(told([0], [0], [0]), more=(True,), least=10)
    known = folded(empty(1).grown(1), {0: 8}, [(0, declining)])
    assert known.reached.tolist() == [[0]]
    assert known.over.tolist() == [False]
    known = folded(known, {0: 10}, [(0, declining)])
    assert known.reached.tolist() == [[10]], "of so many it says nothing as it has told of them: to go on behind them"


def test_a_silo_that_joins_has_tried_nothing() -> None:
    known = two_silos().begun([0, 1]).joined(1)
    assert known.counts.tolist() == [[4, 2, 0], [4, 0, 0]]
    assert known.asked.tolist() == [0, 0]
    assert known.mean().tolist() == [0.5, 1.0]


def test_calls_are_those_of_the_round() -> None:
    known = two_silos()
    assert known.spent == 8
    known = known.begun([1])
    assert known.spent == 0
    assert folded(known, {1: 4}, [(1, told([1], [1], [3]))]).spent == 3


def test_a_noisy_mean_lies_in_its_interval_and_that_in_the_scores() -> None:
    known = folded(empty(1, 0.01).grown(2), {0: 4, 1: 4}, [(0, told([8.0, -3.0], [], [4, 4]))])
    for c, end in ((0, 1.0), (1, 0.0)):
        mean, low, high, _ = known.interval(c, 0)
        assert 0 <= low <= mean <= high <= 1
        assert mean == end
