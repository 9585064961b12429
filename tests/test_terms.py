"""Words as numbers, and what a rare one weighs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.retrieval.terms import idf, terms


def test_case_and_ways_of_writing_are_one_word() -> None:
    assert terms("Größe größe GRÖSSE") == terms("grösse grösse grösse")
    assert terms("cafe\u0301") == terms("caf\u00e9")
    assert sorted(terms("the cat, the dog").values()) == [1, 1, 2]
    assert terms("... !") == {}


def test_where_no_spaces_part_words() -> None:
    """Of each two letters: what is asked for is part of what is written."""
    assert len(terms("\u5317\u4eac")) == 1
    assert terms("\u5317\u4eac").keys() <= terms("\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd").keys()
    assert terms("\u5317x\u4eac").total() == 3


@given(st.lists(st.sampled_from(["a", "bc", "42", "naïve", "x_y"]), max_size=9))
def test_as_many_numbers_as_words(words: list[str]) -> None:
    counts = terms(" ".join(words))
    assert counts.total() == len(words)
    assert len(counts) == len(set(words))
    assert all(0 <= number < 2**63 for number in counts)


def test_a_rare_word_weighs_more() -> None:
    assert idf(10, 1) == pytest.approx(math.log(1 + 9.5 / 1.5))
    assert idf(10, 10) == pytest.approx(math.log(1 + 0.5 / 10.5))
    assert idf(10, 1) > idf(10, 5) > idf(10, 10) > 0
