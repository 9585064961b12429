"""Each way by hand: three silos, one place, two outcomes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtailor import consensus
from fedtailor.errors import UserError

THREE = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.3, 0.7]]])
ALL = torch.ones(3, 1, dtype=torch.bool)
LOSSES = torch.tensor([[0.5], [1.0], [2.0]])


def close(found: Tensor, *expected: float) -> None:
    assert found[0].tolist() == pytest.approx(list(expected), abs=1e-5)


def test_mean() -> None:
    close(consensus.mean(THREE, ALL, LOSSES), 0.6, 0.4)
    close(consensus.mean(THREE, torch.tensor([[True], [False], [True]]), LOSSES), 0.6, 0.4)
    close(consensus.mean(THREE, torch.tensor([[True], [True], [False]]), LOSSES), 0.75, 0.25)


def test_validation_believes_who_answers_its_own_rows_well() -> None:
    weights = [1, math.exp(-0.5), math.exp(-1.5)]
    right = (0.9 * weights[0] + 0.6 * weights[1] + 0.3 * weights[2]) / sum(weights)
    close(consensus.validation(THREE, ALL, LOSSES), right, 1 - right)


def test_entropy_believes_who_is_sure() -> None:
    """exp(-entropy) is p^p q^q: .9^.9 .1^.1 = .7225, .6^.6 .4^.4 = .5101, .3^.3 .7^.7 = .5429."""
    weights = [0.9**0.9 * 0.1**0.1, 0.6**0.6 * 0.4**0.4, 0.3**0.3 * 0.7**0.7]
    assert weights == pytest.approx([0.7225, 0.5101, 0.5429], abs=1e-4)
    right = (0.9 * weights[0] + 0.6 * weights[1] + 0.3 * weights[2]) / sum(weights)
    close(consensus.entropy(THREE, ALL, LOSSES), right, 1 - right)


def test_familiar_believes_whose_kind_of_row_it_is() -> None:
    """exp(-entropy), above, times exp(-4 strangeness): the first silo's rows are as this one is."""
    weights = [0.7225 * 1, 0.5101 * math.exp(-2), 0.5429 * math.exp(-6)]
    right = (0.9 * weights[0] + 0.6 * weights[1] + 0.3 * weights[2]) / sum(weights)
    assert consensus.familiar(THREE, ALL, LOSSES)[0].tolist() == pytest.approx([right, 1 - right], abs=1e-4)


def test_median() -> None:
    close(consensus.median(THREE, ALL, LOSSES), 0.6, 0.4)
    close(consensus.median(THREE, torch.tensor([[True], [True], [False]]), LOSSES), 0.75, 0.25)


def test_trimmed() -> None:
    close(consensus.trimmed(THREE, ALL, LOSSES), 0.6, 0.4)  # of three, one goes at either end
    close(consensus.trimmed(THREE, torch.tensor([[True], [True], [False]]), LOSSES), 0.75, 0.25)  # of two, none
    close(consensus.trimmed(THREE, torch.tensor([[False], [False], [True]]), LOSSES), 0.3, 0.7)


def test_one_liar_of_five_moves_the_robust_ones_little() -> None:
    honest, liar = [[[0.8, 0.2]], [[0.78, 0.22]], [[0.82, 0.18]], [[0.8, 0.2]]], [[0.0, 1.0]]
    probs, spoken, losses = torch.tensor([*honest, liar]), torch.ones(5, 1, dtype=torch.bool), torch.zeros(5, 1)
    assert float(consensus.mean(probs, spoken, losses)[0, 0]) == pytest.approx(0.64)
    for way in (consensus.median, consensus.trimmed):
        assert 0.78 <= float(way(probs, spoken, losses)[0, 0]) <= 0.82


@given(st.sampled_from(sorted(consensus.names())), st.integers(1, 5), st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_distributions_in_and_out(name: str, silos: int, places: int, outcomes: int, seed: int) -> None:
    """Whoever spoke: rows add up to 1, nothing is 0, the order of silos does not matter, and of one silo it is what it says."""
    dice = torch.Generator().manual_seed(seed)
    probs = torch.rand(silos, places, outcomes, generator=dice).add(0.05)
    probs /= probs.sum(-1, keepdim=True)
    spoken = torch.rand(silos, places, generator=dice) < 0.7
    losses, way = torch.rand(silos, places, generator=dice), consensus.find(name)
    found = way(probs, spoken, losses)
    assert found.shape == (places, outcomes)
    assert torch.allclose(found.sum(-1), torch.ones(places))
    assert bool((found > 0).all())
    turned = torch.randperm(silos, generator=dice)
    assert torch.allclose(way(probs[turned], spoken[turned], losses[turned]), found, atol=1e-5)
    alone = spoken.sum(0) == 1
    said = (probs * spoken[..., None]).sum(0)
    assert torch.allclose(found[alone], said[alone], atol=1e-5)


def test_an_unknown_name_is_told_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"did you mean 'median'"):
        consensus.find("medain")


@pytest.mark.parametrize("gap", [1.0, 20.0, 500.0])
def test_a_silo_that_speaks_alone_is_believed_however_bad_it_is(gap: float) -> None:
    alone = torch.tensor([[True], [False], [False]])
    close(consensus.validation(THREE, alone, torch.tensor([[gap], [0.0], [0.0]])), 0.9, 0.1)
