"""Aggregators, by hand and by property."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtailor import aggregate
from fedtailor.errors import UserError

MIXED = ["nnm_median", "nnm_geometric_median"]
ALL = ["mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", *MIXED, "norm_clipping"]
ROBUST = ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", *MIXED]


def replies(*pairs: tuple[list[float], float]) -> list[tuple[dict[str, torch.Tensor], float]]:
    return [({"w": torch.tensor(values), "b": torch.tensor(values[0])}, weight) for values, weight in pairs]


def points(*values: float, weights: Sequence[float] = ()) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Replies of one number each."""
    return [({"w": torch.tensor([v])}, w) for v, w in zip(values, weights or [1.0] * len(values), strict=True)]


def told(name: str, some: list[tuple[dict[str, torch.Tensor], float]], byzantine: float = 0.2) -> float:
    return aggregate.find(name, byzantine)(some)["w"].item()


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


def test_the_trimmed_mean_by_hand_ignores_weights() -> None:
    some = replies(([9.0, 0.0], 1.0), ([1.0, 1.0], 7.0), ([2.0, 2.0], 1.0), ([6.0, -50.0], 1.0), ([4.0, 3.0], 1.0))
    # one at each end: (2 + 4 + 6) / 3, (0 + 1 + 2) / 3
    assert aggregate.trimmed_mean(some, byzantine=0.2)["w"].tolist() == [4.0, 1.0]
    # two at each end leave the median; none leaves all five
    assert aggregate.trimmed_mean(some, byzantine=0.4)["w"].tolist() == [4.0, 1.0]
    assert aggregate.trimmed_mean(some, byzantine=0.1)["w"].tolist() == pytest.approx([22 / 5, -44 / 5])
    assert aggregate.trimmed_mean(some, byzantine=0.1)["b"].item() == pytest.approx(22 / 5)


def test_krum_by_hand() -> None:
    some = points(0.0, 1.0, 3.0, 4.5, 100.0, weights=[1.0, 1.0, 1.0, 9.0, 9.0])
    # f = 1, so 2 neighbours: 0: 1 + 9 = 10; 1: 1 + 4 = 5; 3: 2.25 + 4 = 6.25; 4.5: 2.25 + 12.25; 100: far
    assert told("krum", some) == 1.0
    # without attackers 3 neighbours: 0: 10 + 20.25; 1: 5 + 12.25 = 17.25; 3: 6.25 + 9 = 15.25; 4.5: 14.5 + 20.25
    assert told("krum", some, 0.0) == 3.0
    assert told("krum", points(5.0, 1.0, 5.0)) == 5.0


def test_krum_takes_the_tensors_of_a_reply_as_one_vector() -> None:
    # in w alone the first is in the middle; with b, it is far from all others
    some = [({"w": torch.tensor([w]), "b": torch.tensor(b)}, 1.0) for w, b in ((2.0, 90.0), (0.0, 0.0), (4.0, 1.0), (1.0, 0.0))]
    found = aggregate.krum(some, byzantine=0.25)
    assert (found["w"].item(), found["b"].item()) == (0.0, 0.0)


def test_multi_krum_by_hand_weighs_those_it_takes() -> None:
    some = points(0.0, 1.0, 3.0, 4.5, 100.0, weights=[1.0, 1.0, 1.0, 5.0, 9.0])
    # scores as above; 4 of 5 stay: (0 + 1 + 3 + 5 * 4.5) / 8
    assert told("multi_krum", some) == pytest.approx(26.5 / 8)
    # 3 of 5 stay, with one neighbour each: 0: 1; 1: 1; 3: 2.25; 4.5: 2.25, later
    assert told("multi_krum", some, 0.4) == pytest.approx(4 / 3)


def test_the_geometric_median_by_hand() -> None:
    # of a triangle, where each side is seen under 120 degrees: by symmetry on the axis, 1 / sqrt(3) above the base of 2
    some = [({"w": torch.tensor(corner)}, 1.0) for corner in ([-1.0, 0.0], [1.0, 0.0], [0.0, 4.0])]
    assert aggregate.geometric_median(some)["w"].tolist() == pytest.approx([0.0, 1 / math.sqrt(3)], abs=1e-4)
    # on a line it is the median, and weights count as replies would: (1, 2, 2, 2, 7, 9)
    assert told("geometric_median", points(9.0, 1.0, 2.0)) == pytest.approx(2.0, abs=1e-4)
    assert told("geometric_median", points(9.0, 1.0, 2.0, 7.0, weights=[1.0, 1.0, 4.0, 1.0])) == pytest.approx(2.0, abs=1e-4)
    assert told("geometric_median", points(9.0, 2.0, weights=[3.0, 2.0])) == pytest.approx(9.0, abs=1e-4)


def test_mixing_with_neighbours_by_hand() -> None:
    some = points(0.0, 1.0, 3.0, 5.0, 100.0, weights=[1.0, 1.0, 1.0, 1.0, 9.0])
    # 4 of 5 are mixed: the first four become (0 + 1 + 3 + 5) / 4 = 2.25, the liar (100 + 5 + 3 + 1) / 4 = 27.25
    assert told("nnm_median", some) == 2.25
    assert told("nnm_median", points(0.0, 1.0, 3.0, 5.0, 100.0, weights=[5.0, 1.0, 1.0, 1.0, 9.0])) == 2.25
    # weights are those of the replies, so that a liar with more than half of them has its way
    assert told("nnm_geometric_median", some) == pytest.approx(27.25, abs=1e-4)
    assert told("nnm_geometric_median", points(0.0, 1.0, 3.0, 5.0, 100.0)) == pytest.approx(2.25, abs=1e-4)
    # 3 of 5: 0 and 1 become (0 + 1 + 3) / 3, 3 and 5 become (1 + 3 + 5) / 3, 100 becomes 36
    assert told("nnm_median", some, 0.4) == pytest.approx(3)
    # nobody is thought to attack: each becomes the mean of all
    assert told("nnm_median", points(1.0, 2.0, 6.0), 0.0) == 3.0


def test_replies_are_neighbours_by_all_their_tensors() -> None:
    # in w alone the second is nearest to the first; with b, the third is: (0 + 4) / 2, (0 + 1) / 2, and so on
    some = [({"w": torch.tensor([w]), "b": torch.tensor(b)}, 1.0) for w, b in ((0.0, 0.0), (1.0, 90.0), (4.0, 1.0), (3.0, 0.0))]
    found = aggregate.nnm_median(some, byzantine=0.49)  # 1 of 4 attacks, 3 are mixed
    # w: 7/3 (1, 3, 4), 8/3 (2, 3, 4), 7/3, 7/3; b: 1/3, 91/3, 1/3, 1/3
    assert (found["w"].item(), found["b"].item()) == pytest.approx((7 / 3, 1 / 3))


def test_norm_clipping_by_hand() -> None:
    sent = [(3.0, 4.0), (0.6, 0.8), (-30.0, 40.0)]
    some = [({"w": torch.tensor([w]), "b": torch.tensor(b)}, 1.0 + i) for i, (w, b) in enumerate(sent)]
    found = aggregate.norm_clipping(some)
    # norms 5, 1, 50: none above 5, so the third is (-3, 4); weights 1, 2, 3
    assert found["w"].item() == pytest.approx((3 + 2 * 0.6 - 3 * 3) / 6)
    assert found["b"].item() == pytest.approx((4 + 2 * 0.8 + 3 * 4) / 6)
    assert told("norm_clipping", points(0.0, 0.0, 8.0)) == 0.0


numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)
names = st.sampled_from(ALL)
shares = st.floats(0, 0.49)
many = settings(max_examples=100, deadline=None)


@given(numbers, names, shares)
@many
def test_an_aggregate_lies_between_the_replies(values: list[float], name: str, byzantine: float) -> None:
    """But for clipping, which may pull towards 0."""
    found = told(name, points(*values, weights=[1.0 + i for i in range(len(values))]), byzantine)
    bounds = [*values, 0.0] if name == "norm_clipping" else values
    assert min(bounds) - 1e-4 <= found <= max(bounds) + 1e-4


@given(numbers, names, shares)
@many
def test_one_silo_gets_back_what_it_sent(values: list[float], name: str, byzantine: float) -> None:
    assert aggregate.find(name, byzantine)(replies((values, 3.0)))["w"].tolist() == values


@given(numbers, names, shares, st.integers(2, 5))
@many
def test_what_all_send_comes_back(values: list[float], name: str, byzantine: float, count: int) -> None:
    found = aggregate.find(name, byzantine)(replies(*((values, 1.0 + i) for i in range(count))))
    assert found["w"].tolist() == pytest.approx(values, rel=1e-5, abs=1e-30)


@given(st.data(), names, shares)
@many
def test_the_order_of_replies_does_not_matter(data: st.DataObject, name: str, byzantine: float) -> None:
    """Replies that tie for Krum are apart here: no two distances are equal."""
    count = data.draw(st.integers(1, 6))
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    if name in ("krum", "multi_krum") and count - int(byzantine * count + 1e-9) - 2 < 2:
        count = 6  # of one neighbour, the nearest two are each other's: a tie
        byzantine = 0.2
    some = [({"w": torch.randn(3, generator=dice), "b": torch.randn(2, 2, generator=dice)}, 1.0 + i) for i in range(count)]
    other = data.draw(st.permutations(some))
    one, two = (aggregate.find(name, byzantine)(replies) for replies in (some, other))
    for n in one:
        assert torch.allclose(one[n], two[n], rtol=1e-4, atol=1e-5)


small = st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4)


@given(small, st.sampled_from(ROBUST), st.floats(1e3, 1e30), st.integers(0, 4))
@many
@example([0.0, 0.0, 0.0, 0.6875], "geometric_median", 8.722127402420818e29, 1)
@example([0.0, 0.25, 0.5, 0.6875], "geometric_median", 8.722127402420818e29, 1)
def test_a_liar_among_five_does_not_move_a_robust_one_beyond_the_others(
    honest: list[float], name: str, lie: float, place: int
) -> None:
    values = [*honest[:place], lie, *honest[place:]]
    assert min(honest) - 1e-4 <= told(name, points(*values)) <= max(honest) + 1e-4
    assert told("mean", points(*values)) > 100


def test_a_liar_is_clipped_to_what_the_others_send() -> None:
    honest, lie = [({"w": torch.tensor([1.0, 0.0])}, 1.0)] * 4, ({"w": torch.tensor([0.0, 1e9])}, 1.0)
    assert aggregate.norm_clipping([*honest, lie])["w"].tolist() == pytest.approx([0.8, 0.2])


def test_replies_of_many_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = torch.Generator().manual_seed(0)
    some = [({"w": torch.randn(5, 7, generator=dice), "b": torch.randn((), generator=dice)}, 1.0 + i) for i in range(5)]
    whole = [aggregate.find(name)(some) for name in ALL]
    monkeypatch.setattr(aggregate, "CHUNK", 3)
    for name, one in zip(ALL, whole, strict=True):
        two = aggregate.find(name)(some)
        assert {n: t.shape for n, t in two.items()} == {"w": (5, 7), "b": ()}
        assert all(torch.allclose(one[n], two[n]) for n in one), name


def test_aggregators_are_found_by_name() -> None:
    assert aggregate.find("mean") is aggregate.mean
    assert aggregate.find("median", 0.3) is aggregate.median


def test_the_share_of_attackers_goes_to_those_that_ask() -> None:
    for name in ("trimmed_mean", "krum", "multi_krum", "nnm_median", "fedtailor.aggregate:krum"):
        found = aggregate.find(name, 0.4)
        assert isinstance(found, functools.partial)
        assert found.keywords == {"byzantine": 0.4}


@pytest.mark.parametrize("name", ["medain", "find", "finding", "torch", "Aggregate", "sys", "", "_private"])
def test_anything_else_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.aggregate = .*\(choices: .*mean, median.*'package\.module:function'"):
        aggregate.find(name)


def test_a_misspelt_one_is_corrected() -> None:
    with pytest.raises(UserError, match="'medain': no such function; did you mean 'median'"):
        aggregate.find("medain")
