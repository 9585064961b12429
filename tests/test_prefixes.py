"""What rows begin with is read once; what candidates share is not read again; the numbers are the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.answering import fresh
from fedtailor.data import Row
from fedtailor.models import Resident
from fedtailor.prefixes import MOST, Prefixes, common
from fedtailor.prompts import Prompt, opened

LABELS = ("b", "g")  # of one token each: one pass answers for both
LONG = "Read the text below with the greatest care, and judge it. "


def test_what_two_texts_share() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert common([], [1]) == 0
    assert common([2], [1]) == 0


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_what_is_shared_is_a_beginning_of_both(one: list[int], other: list[int]) -> None:
    n = common(one, other)
    assert one[:n] == other[:n]
    assert n in (len(one), len(other)) or one[n] != other[n]


def read(base: Resident, prefixes: Prefixes, ids: list[int]) -> torch.Tensor:
    """The keys of the last layer, (heads, tokens, width)."""
    keys: torch.Tensor = prefixes.cache(fresh(base).tuned, None, ids).layers[-1].keys[0]
    return keys


def test_a_text_is_read_on_from_what_is_known(causal: Resident) -> None:
    one, other = list(range(40)), [*range(30), 99, 98, 97]
    prefixes = Prefixes()
    read(causal, prefixes, one)
    assert prefixes.tokens == 40
    shared = read(causal, prefixes, other)
    assert prefixes.tokens == 43  # 30 of 33 were known
    assert torch.allclose(shared, read(causal, Prefixes(), other), atol=1e-5)
    read(causal, prefixes, one[:20])
    assert prefixes.tokens == 44  # a beginning of a known text: its last token alone
    read(causal, prefixes, other)
    assert prefixes.tokens == 44  # known whole


def test_what_a_caller_writes_into_a_cache_is_its_own(causal: Resident) -> None:
    prefixes, ids = Prefixes(), list(range(30))
    before = read(causal, prefixes, ids).clone()
    cache = prefixes.cache(fresh(causal).tuned, None, ids)
    cache.batch_repeat_interleave(3)
    for layer in cache.layers:
        layer.keys.zero_()
    assert torch.equal(read(causal, prefixes, ids), before)


def test_no_more_are_kept_than_are_needed(causal: Resident) -> None:
    prefixes = Prefixes()
    for first in range(10):
        read(causal, prefixes, [first, *range(100, 130)])
    assert len(prefixes.known) == MOST


def test_candidates_are_scored_the_same_with_and_without(causal: Resident) -> None:
    rows = [Row(f"tea {i}", "g") for i in range(5)]
    prompts = [Prompt(LONG + "{input}:"), Prompt(LONG + "It is short. {input}:"), Prompt("{input}:", examples=(("x" * 30, "g"),))]
    prefixes = Prefixes()
    for prompt in prompts:
        apart = torch.cat([opened(causal, prompt, LABELS).scores([row], LABELS) for row in rows])
        together = opened(causal, prompt, LABELS, prefixes).scores(rows, LABELS)
        assert torch.allclose(apart, together, atol=1e-5)
    # the second prompt's beginning was known from the first
    assert prefixes.tokens < sum(len(prompt.told(rows[0]).prompt) for prompt in prompts)
