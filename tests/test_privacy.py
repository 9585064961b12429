"""Noise of a stated epsilon has the distribution that gives it, and the account is right, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedtailor.privacy import Noise, noise


def test_no_noise_changes_nothing() -> None:
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert noise("none", 8, 1e-5, 10) == Noise()
    assert Noise().on(sums, 0) is sums
    assert Noise().variance == 0
    assert Noise().spent(0) == 0
    assert Noise().spent(1) == math.inf


def test_laplace_by_hand() -> None:
    """20 sums, epsilon 4: b = 5, so each sum costs 1 / 5."""
    made = noise("laplace", 4, 1e-5, 20)
    assert made.scale == 5
    assert made.variance == 50
    assert made.spent(1) == pytest.approx(0.2)
    assert made.spent(20) == pytest.approx(4)


def test_gaussian_by_hand() -> None:
    """rho = n / (2 s^2): 32 sums at s = 4 are rho = 1, so epsilon = 1 + 2 sqrt(ln(1 / delta))."""
    delta = math.exp(-4)
    assert Noise("gaussian", 4.0, 99.0, delta).spent(32) == pytest.approx(1 + 2 * math.sqrt(4))
    made = noise("gaussian", 5.0, delta, 32)
    assert made.scale == pytest.approx(4)
    assert made.variance == pytest.approx(16)


@given(
    st.sampled_from(["laplace", "gaussian"]), st.floats(0.1, 50), st.floats(1e-9, 0.1), st.integers(1, 500)
)
def test_all_releases_cost_what_was_stated(kind: str, epsilon: float, delta: float, releases: int) -> None:
    made = noise(kind, epsilon, delta, releases)  # type: ignore[arg-type]
    assert made.spent(releases) == pytest.approx(epsilon, rel=1e-6)
    costs = [made.spent(n) for n in range(releases + 1)]
    assert costs == sorted(costs)
    assert costs[0] == 0


@pytest.mark.parametrize(
    ("kind", "law"), [("laplace", stats.laplace(scale=5.0)), ("gaussian", stats.norm(scale=5.0))]
)
def test_the_noise_has_its_distribution(kind: str, law: object) -> None:
    made = Noise(kind, 5.0, 1.0, 1e-5)  # type: ignore[arg-type]
    drawn = made.on(torch.full((20_000,), 7.0, dtype=torch.float64), 1) - 7
    assert stats.kstest(drawn.numpy(), law.cdf).pvalue > 0.01  # type: ignore[attr-defined]
    assert drawn.var().item() == pytest.approx(made.variance, rel=0.05)
    other = stats.norm(scale=5.0) if kind == "laplace" else stats.laplace(scale=5.0)
    assert stats.kstest(drawn.numpy(), other.cdf).pvalue < 1e-6  # the test can tell


def test_what_laplace_noise_tells_of_one_row_is_bounded() -> None:
    """The definition itself: over any outcome, two sums one row apart differ in likelihood by e^epsilon at most."""
    made = noise("laplace", 0.5, 1e-5, 1)
    zero = torch.zeros(200_000, dtype=torch.float64)
    one, other = made.on(zero, 1), made.on(zero + 1, 2)
    edges = torch.linspace(-6, 6, 25, dtype=torch.float64)
    counts = [torch.histogram(x, edges).hist for x in (one, other)]
    ratio = (counts[0] / counts[1]).log().abs()
    assert bool((ratio < 0.5 + 4 * (1 / counts[0] + 1 / counts[1]).sqrt()).all())
    assert ratio.max() > 0.4  # and it is used up


def test_a_seed_repeats_and_the_system_does_not() -> None:
    made = Noise("laplace", 5.0, 1.0)
    sums = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(made.on(sums, 3), made.on(sums, 3))
    assert not torch.equal(made.on(sums, 3), made.on(sums, 4))
    assert not torch.equal(made.on(sums, None), made.on(sums, None))
