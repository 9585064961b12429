"""Which silos are worth asking: noisy means of their vectors, what they promise, and which are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.retrieval.routing import LEAST, SELDOM, WORDS, Known, centroids, chosen, promises
from fedtailor.retrieval.scoring import Question, Statistics
from fedtailor.retrieval.store import SCALE, Vectors

NONE = np.zeros((0, 2), np.float32)


def units(angles: list[float]) -> Vectors:
    """Vectors of two numbers at these angles, in degrees."""
    turned = np.radians(angles)
    return np.rint(np.stack([np.cos(turned), np.sin(turned)], 1) * SCALE).astype(np.int16)


def scattered(count: int, size: int = 4, seed: int = 0) -> Vectors:
    drawn = np.random.default_rng(seed).normal(size=(count, size))
    return np.rint(drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * SCALE).astype(np.int16)


# means


def test_means_of_groups_by_hand() -> None:
    """Two groups of five, each around one direction; without noise each mean is that of its five."""
    near, far = [-10.0, -5.0, 0.0, 5.0, 10.0], [80.0, 85.0, 90.0, 95.0, 100.0]
    found = centroids(units(near + far), 2, 0.0, 1)
    length = (1 + 2 * math.cos(math.radians(5)) + 2 * math.cos(math.radians(10))) / 5
    assert sorted(found.tolist()) == [pytest.approx([0, length], abs=1e-4), pytest.approx([length, 0], abs=1e-4)]


@given(passages=st.integers(0, 40), count=st.integers(0, 12))
def test_there_are_at_most_so_many_and_none_of_few_passages(passages: int, count: int) -> None:
    found = centroids(scattered(passages), count, 1.0, 3)
    assert found.shape == (min(count, passages // LEAST), 4)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_the_seed_decides() -> None:
    vectors = scattered(40)
    one, same, other = (centroids(vectors, 3, 1.0, seed) for seed in (7, 7, 8))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(centroids(vectors, 3, 1.0, 2**70 + 7), centroids(vectors, 3, 1.0, 2**70 + 7)), "any number is a seed"


@pytest.mark.parametrize(("passages", "noise"), [(8, 1.0), (20, 1.0), (20, 3.0)])
def test_noise_is_a_multiple_of_how_far_one_passage_moves_the_mean(passages: int, noise: float) -> None:
    """One group: its mean moves by 2 / passages at most, from one end of the sphere to the other. 2,000 draws tell the standard
    deviation to 1.6 % (1 / sqrt(2 * 2000)), and the mean to 2.2 % of it; six of these is never seen."""
    vectors = scattered(passages)
    mean = (vectors / SCALE).mean(0)
    drawn = np.stack([centroids(vectors, 1, noise, seed)[0] - mean for seed in range(500)]).ravel()
    spread = noise * 2 / passages
    assert len(drawn) == 2000
    assert drawn.std() == pytest.approx(spread, rel=0.1)
    assert abs(drawn.mean()) < 0.14 * spread


# promises


def known(passages: int, having: dict[int, int], means: np.ndarray = NONE) -> Known:  # type: ignore[type-arg]
    return Known(Statistics(passages, 10 * passages, having), means.astype(np.float32))


def asked(weights: dict[int, float], angle: float = 0.0) -> Question:
    return Question(units([angle])[0], weights, 10.0)


def test_the_nearest_mean_counts_whatever_its_length() -> None:
    told = promises(
        asked({}),
        {
            "near": known(9, {}, np.array([[0.0, 0.9], [0.2, 0.2]])),  # 90 and 45 degrees
            "same": known(9, {}, np.array([[0.01, 0.0]])),
            "away": known(9, {}, np.array([[-3.0, 0.0]])),
            "none": known(9, {}),
            "other": known(9, {}, np.ones((2, 3))),  # by an embedder of three numbers
            "zero": known(9, {}, np.zeros((1, 2))),
        },
    )
    assert told == {name: pytest.approx(value, abs=1e-4) for name, value in {
        "near": math.sqrt(0.5), "same": 1.0, "away": -1.0, "none": 0.0, "other": 0.0, "zero": 0.0,
    }.items()}  # fmt: skip


def test_words_count_by_how_much_more_often_than_on_the_average() -> None:
    """Word 1 weighs 3, word 2 weighs 1. Shares of word 1: 10/100, 0, 2/20; of word 2: 0, 5/10, 0."""
    silos = {"a": known(100, {1: 10}), "b": known(10, {2: 5}), "c": known(20, {1: 2})}
    told = promises(asked({1: 3.0, 2: 1.0}), silos)
    means = {1: (0.1 + 0 + 0.1) / 3 + SELDOM, 2: (0 + 0.5 + 0) / 3 + SELDOM}
    by_hand = {
        name: WORDS * (3 / 4 * math.log((one + SELDOM) / means[1]) + 1 / 4 * math.log((two + SELDOM) / means[2]))
        for name, one, two in (("a", 0.1, 0), ("b", 0, 0.5), ("c", 0.1, 0))
    }
    assert told == {name: pytest.approx(value) for name, value in by_hand.items()}
    assert told["a"] == told["c"], "the share counts, not the size"
    assert told["a"] > told["b"]


def test_a_word_that_all_have_alike_says_nothing_and_neither_does_an_empty_silo() -> None:
    alike = {"a": known(10, {1: 5}), "b": known(20, {1: 10})}
    assert promises(asked({1: 2.0}), alike) == {"a": pytest.approx(0), "b": pytest.approx(0)}
    found = promises(asked({1: 2.0}), {"a": known(10, {1: 5}), "empty": known(0, {})})
    assert found["empty"] == pytest.approx(WORDS * math.log(SELDOM / (0.25 + SELDOM)))


# the choice


@pytest.mark.parametrize(
    ("most", "margin", "silos"),
    [
        (9, 9.0, ("d", "a", "c", "b")),  # in the order given
        (9, 0.3, ("d", "a", "b")),
        (9, 0.25, ("d", "a", "b")),  # exactly so far below
        (9, 0.0, ("d", "a")),
        (1, 9.0, ("a",)),  # of equals the first by name
        (2, 0.0, ("d", "a")),
        (3, 9.0, ("d", "a", "b")),
        (0, 9.0, ()),
    ],
)
def test_the_choice_by_hand(most: int, margin: float, silos: tuple[str, ...]) -> None:
    assert chosen({"d": 0.5, "a": 0.5, "c": 0.125, "b": 0.25}, most, margin) == silos


@given(
    told=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(-4, 4).map(lambda n: n / 4), max_size=8),
    most=st.integers(1, 9),
    margin=st.integers(0, 8).map(lambda n: n / 4),
)
def test_the_best_are_chosen_and_none_that_is_too_far_below(told: dict[str, float], most: int, margin: float) -> None:
    found = chosen(told, most, margin)
    best = max(told.values(), default=0)
    within = [silo for silo in told if told[silo] >= best - margin]
    assert len(found) == min(most, len(within))
    assert list(found) == [silo for silo in told if silo in found]
    assert set(found) <= set(within)
    assert all(told[one] >= told[other] for one in found for other in set(within) - set(found))
