"""Aggregators, by hand and by property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import aggregate
from fedtailor.errors import UserError


def replies(*pairs: tuple[list[float], float]) -> list[tuple[dict[str, torch.Tensor], float]]:
    return [({"w": torch.tensor(values), "b": torch.tensor(values[0])}, weight) for values, weight in pairs]


def test_the_mean_by_hand() -> None:
    found = aggregate.mean(replies(([1.0, 2.0], 1.0), ([5.0, -2.0], 3.0)))
    # w: (1 + 3 * 5) / 4, (2 - 3 * 2) / 4
    assert found["w"].tolist() == [4.0, -1.0]
    assert found["b"].item() == 4.0


def test_the_median_by_hand_ignores_weights() -> None:
    odd = aggregate.median(replies(([1.0, 9.0], 1.0), ([5.0, 7.0], 1000.0), ([100.0, 8.0], 1.0)))
    assert odd["w"].tolist() == [5.0, 8.0]
    assert odd["b"].item() == 5.0
    even = aggregate.median(replies(([1.0, 4.0], 1.0), ([3.0, 8.0], 1.0)))
    assert even["w"].tolist() == [2.0, 6.0]


numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(numbers, st.sampled_from(["mean", "median"]))
@settings(max_examples=50, deadline=None)
def test_an_aggregate_lies_between_the_replies(values: list[float], name: str) -> None:
    found = aggregate.find(name)(replies(*(([value], 1.0 + i) for i, value in enumerate(values))))["w"].item()
    assert min(values) - 1e-4 <= found <= max(values) + 1e-4


@given(numbers, st.sampled_from(["mean", "median"]))
@settings(max_examples=20, deadline=None)
def test_one_silo_gets_back_what_it_sent(values: list[float], name: str) -> None:
    found = aggregate.find(name)(replies((values, 3.0)))
    assert found["w"].tolist() == values


def test_the_median_stands_one_liar_and_the_mean_does_not() -> None:
    told = replies(([1.0], 1.0), ([1.1], 1.0), ([1e9], 1.0))
    assert aggregate.median(told)["w"].item() == pytest.approx(1.1)
    assert aggregate.mean(told)["w"].item() > 1e8


def test_aggregators_are_found_by_name() -> None:
    assert aggregate.find("mean") is aggregate.mean
    assert aggregate.find("median") is aggregate.median


@pytest.mark.parametrize("name", ["medain", "find", "finding", "torch", "Aggregate", "sys", "", "_private"])
def test_anything_else_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.aggregate = .*\(choices: .*mean, median.*'package\.module:function'"):
        aggregate.find(name)


def test_a_misspelt_one_is_corrected() -> None:
    with pytest.raises(UserError, match="'medain': no such function; did you mean 'median'"):
        aggregate.find("medain")
