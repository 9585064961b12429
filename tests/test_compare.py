"""Statistics over few seeds: by hand, with the t distribution's own closed forms, and what must always hold."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.study.compare import exceeds, holm, interval, non_inferior, paired

FIGURES = st.dictionaries(st.integers(0, 5), st.floats(0.01, 1), min_size=2, max_size=6)


def cauchy(t: float) -> float:
    """The upper tail of Student's t with one degree of freedom."""
    return 0.5 - math.atan(t) / math.pi


def two(t: float) -> float:
    """The upper tail of Student's t with two degrees of freedom."""
    return 0.5 - t / (2 * math.sqrt(2 + t * t))


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, error 1 / sqrt 3; t of 97.5 % with two degrees of freedom is 4.302653."""
    found = interval({2: 3.0, 0: 1.0, 1: 2.0})
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(found.half)
    assert list(found.values) == [0, 1, 2]


def test_one_seed_has_no_interval() -> None:
    found = interval({7: 0.5})
    assert (found.mean, found.n, found.known) == (0.5, 1, False)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(interval({}).mean)
    assert math.isnan(paired({0: 1.0}, {0: 0.5}).p)
    assert paired({0: 1.0}, {0: 0.5}).difference.mean == 0.5
    assert not non_inferior({0: 1.0}, {0: 0.5}, 0.1, "higher").holds


def test_a_paired_test_by_hand() -> None:
    """Differences 1, 2, 3: t = 2 sqrt 3. Seed 9 has no partner and does not count."""
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (found.n, found.difference.mean) == (3, 2)
    assert found.p == pytest.approx(2 * two(2 * math.sqrt(3)))
    assert not found.shown  # p = .074


def test_pairs_take_out_what_seeds_share() -> None:
    """Figures from 0.1 to 0.9, but every seed gains 0.05 or 0.06: t = 0.055 / 0.005 = 11 with one degree of freedom."""
    found = paired({0: 0.15, 1: 0.96}, {0: 0.1, 1: 0.9})
    assert found.p == pytest.approx(2 * cauchy(11))


def test_no_spread_at_all() -> None:
    same = {0: 0.3, 1: 0.4, 2: 0.9}
    assert paired(same, same).p == 1
    gained = paired({seed: value + 0.1 for seed, value in same.items()}, same)  # floats: 0.1, 0.1 and a little less
    assert (gained.p, gained.n) == (0, 3)
    assert gained.difference.half == 0
    assert non_inferior(same, same, 0.02, "higher").holds
    assert not non_inferior(same, same, 0.0, "higher").holds


def test_two_equal_differences_are_no_test() -> None:
    """They come by chance where figures are of few test rows: (1/20, 1/20). Three of them are taken for what they are."""
    two_alike, three_alike = (dict.fromkeys(range(n), 0.5) for n in (2, 3))
    less = dict.fromkeys(range(3), 0.45)
    assert math.isnan(paired(two_alike, less).p)
    assert not paired(two_alike, less).shown
    assert math.isnan(exceeds(two_alike, 0.1))
    assert not non_inferior(two_alike, less, 0.02, "higher").holds
    assert math.isnan(non_inferior(two_alike, less, 0.02, "higher").p_inferior)
    assert paired(three_alike, less).shown
    assert non_inferior(three_alike, less, 0.02, "higher").holds


@pytest.mark.parametrize(("better", "sign"), [("higher", -1), ("lower", 1)])
def test_non_inferiority_by_hand(better: str, sign: int) -> None:
    """Worse by 0.01 and 0.02, margin 0.03: 0.015 short of it, error 0.005, t = 3: p = .102. With margin 0.1, t = 17."""
    a = {0: 0.8 + sign * 0.01, 1: 0.7 + sign * 0.02}
    b = {0: 0.8, 1: 0.7}
    near = non_inferior(a, b, 0.03, better)
    assert near.p == pytest.approx(cauchy(3))
    assert near.difference.mean == pytest.approx(sign * 0.015)
    assert not near.holds
    far = non_inferior(a, b, 0.1, better)
    assert far.p == pytest.approx(cauchy(17))
    assert far.holds
    assert far.ratio.mean == pytest.approx(1 + sign * (0.01 / 0.8 + 0.02 / 0.7) / 2)
    assert far.p_inferior == pytest.approx(1 - far.p)


def test_no_ratio_to_nothing() -> None:
    assert non_inferior({0: 0.1, 1: 0.2}, {0: 0.0, 1: 0.1}, 0.1, "higher").ratio.n == 0


def test_above_a_threshold() -> None:
    assert exceeds({0: 1.0, 1: 3.0}, 1) == pytest.approx(cauchy(1))


def test_holm_by_hand() -> None:
    """Three tests: .01 x 3, .03 x 2, .04 x 1 but never below the one before. A test that was not done counts for none."""
    assert holm([0.04, float("nan"), 0.01, 0.03]) == pytest.approx([0.06, float("nan"), 0.03, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_and_keeps_the_order(ps: list[float]) -> None:
    found = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, found, strict=True))
    ordered = sorted(range(len(ps)), key=lambda i: ps[i])
    assert all(found[i] <= found[j] for i, j in itertools.pairwise(ordered))


@given(FIGURES, FIGURES)
def test_what_must_always_hold(a: dict[int, float], b: dict[int, float]) -> None:
    one, other = paired(a, b), paired(b, a)
    assert one.p == pytest.approx(other.p, nan_ok=True)
    assert one.difference.mean == pytest.approx(-other.difference.mean, nan_ok=True)
    if one.difference.half > 1e-9:  # the interval leaves out 0 just where the test is below 5 %
        assert (one.p < 0.05) == (not one.difference.low <= 0 <= one.difference.high)
    strict, loose = (non_inferior(a, b, margin, "higher") for margin in (0.01, 0.5))
    assert not strict.holds or loose.holds
    assert non_inferior(a, b, 0.01, "lower").p == pytest.approx(non_inferior(b, a, 0.01, "higher").p, nan_ok=True)
