"""Products of thin matrices: the same numbers as the whole matrices give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import lowrank
from fedtailor.lowrank import Product


def dense(one: Product) -> torch.Tensor:
    return one.left @ one.right


def drawn(seed: int, out: int, k: int, wide: int) -> Product:
    dice = torch.Generator().manual_seed(seed)
    return lowrank.product(torch.randn(out, k, generator=dice), torch.randn(k, wide, generator=dice))


sizes = st.tuples(*[st.integers(1, 6)] * 3)


@settings(deadline=None)
@given(sizes, st.integers(1, 6), st.integers(0, 99))
def test_sums_differences_and_lengths(size: tuple[int, int, int], other: int, seed: int) -> None:
    one, two = drawn(seed, *size), drawn(seed + 1, size[0], other, size[2])
    assert torch.allclose(dense(one + two), dense(one) + dense(two))
    assert torch.allclose(dense(one - two * 0.5), dense(one) - 0.5 * dense(two))
    assert one.norm() == pytest.approx(float(dense(one).norm()))
    mean = lowrank.mean([one, two], [1.0, 3.0])
    assert torch.allclose(dense(mean), (dense(one) + 3 * dense(two)) / 4)


@settings(deadline=None)
@given(sizes, st.integers(1, 6), st.integers(0, 99))
def test_the_nearest_of_a_rank_is_that_of_the_whole_matrix(size: tuple[int, int, int], rank: int, seed: int) -> None:
    one = drawn(seed, *size)
    u, s, v = torch.linalg.svd(dense(one), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    thin = one.thin(rank)
    assert thin.right.shape[0] <= rank
    assert torch.allclose(dense(thin), best)
    assert torch.allclose(thin.left.norm(dim=0), thin.right.norm(dim=1)), "both sides carry the same"


def test_a_difference_of_equals_is_nothing() -> None:
    one = drawn(0, 50, 3, 40)
    nothing = one - Product(one.left * 4, one.right / 4)
    assert nothing.norm() < 1e-12
    assert (one + one).thin().right.shape[0] == 3, "no more than its rank is kept"
    none = Product(torch.zeros(0, 0), torch.zeros(0, 0))
    assert none.norm() == 0
    assert torch.equal(dense(one + none), dense(one))
    assert torch.equal(dense(none + one), dense(one))
