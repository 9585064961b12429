"""Who gets which row. Small numbers, worked by hand, and what must hold for any."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.errors import UserError
from fedtailor.partition import Kind, _sizes, partition

KINDS: tuple[Kind, ...] = ("iid", "dirichlet", "label", "size")


def deal(kind: Kind, rows: int, silos: int, *, seed: int = 0, labels: int = 3, train: list[bool] | None = None,
         order: list[int] | None = None, alpha: float = 0.5, labels_per_silo: int = 1) -> dict[str, list[int]]:
    order = order or list(range(rows))
    said = train or [True] * rows
    return partition(kind, [f"row {i}" for i in order], [f"label {i % labels}" for i in order],
                     [said[i] for i in order], silos=silos, seed=seed, alpha=alpha, labels_per_silo=labels_per_silo)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), rows=st.integers(30, 90), silos=st.integers(3, 10), seed=st.integers(0, 5),
       alpha=st.sampled_from([0.05, 0.5, 100.0]), data=st.data())
def test_every_row_is_in_one_silo(
    kind: Kind, rows: int, silos: int, seed: int, alpha: float, data: st.DataObject
) -> None:
    train = [i < silos or data.draw(st.booleans()) for i in range(rows)]
    dealt = deal(kind, rows, silos, seed=seed, train=train, alpha=alpha)
    assert sorted(itertools.chain(*dealt.values())) == list(range(rows))
    assert list(dealt) == [f"silo_{n:02d}" for n in range(silos)]
    for members in dealt.values():
        assert members == sorted(members)
        assert any(train[i] for i in members)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), order=st.permutations(range(30)))
def test_the_order_of_the_rows_does_not_matter(kind: Kind, order: list[int]) -> None:
    plain = deal(kind, 30, 4)
    other = deal(kind, 30, 4, order=order)
    assert {name: {order[i] for i in members} for name, members in other.items()} == {
        name: set(members) for name, members in plain.items()
    }


def test_the_seed_decides() -> None:
    for kind in KINDS:
        assert deal(kind, 60, 4, seed=1) == deal(kind, 60, 4, seed=1)
        assert deal(kind, 60, 4, seed=1) != deal(kind, 60, 4, seed=2)


def test_iid_sizes_are_one_row_apart() -> None:
    assert sorted(map(len, deal("iid", 11, 4).values())) == [2, 3, 3, 3]


def test_sizes_grow() -> None:
    # 14 rows, one each first; the other 10 as 1 : 2 : 3 : 4
    assert _sizes(14, 4) == [2, 3, 4, 5]
    assert [len(members) for members in deal("size", 14, 4).values()] == [2, 3, 4, 5]
    assert _sizes(3, 3) == [1, 1, 1]
    assert sum(_sizes(20_000, 1000)) == 20_000


def test_labels_per_silo() -> None:
    for labels_per_silo in (1, 2, 3):
        dealt = deal("label", 60, 6, labels_per_silo=labels_per_silo)
        assert [len({i % 3 for i in members}) for members in dealt.values()] == [labels_per_silo] * 6


def test_alpha_is_skew() -> None:
    def largest_share(alpha: float) -> float:
        dealt = deal("dirichlet", 3000, 5, alpha=alpha).values()
        return sum(max(sum(i % 3 == k for i in members) for k in range(3)) / len(members) for members in dealt) / 5

    # of three labels: one third when even, near one when each silo holds one label
    assert largest_share(1000) < 0.37
    assert largest_share(0.05) > 0.7


@pytest.mark.parametrize(
    ("kind", "rows", "silos", "more", "says"),
    [
        ("iid", 3, 4, {}, "4 silos need a training row each, and there are 3; set silos to 3 or fewer"),
        ("label", 30, 6, {"labels_per_silo": 4}, "labels_per_silo is 4, and the data has 3 labels"),
        ("label", 30, 2, {}, "with 2 silos of 1 labels each, nobody would hold label 2"),
        ("label", 9, 9, {"labels_per_silo": 2}, "6 silos would share the 3 rows of label 'label 0'"),
    ],
)
def test_what_cannot_be_dealt(kind: Kind, rows: int, silos: int, more: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        deal(kind, rows, silos, **more)  # type: ignore[arg-type]
