"""How far public rows are from a silo's own, by hand; rows that the base writes."""

from __future__ import annotations

import math

import pytest

from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.errors import UserError
from fedtailor.models import Resident
from fedtailor.proxies import UNSEEN, distance, generated, strangeness


def rows(*texts: str) -> tuple[Row, ...]:
    return tuple(Row(text, "") for text in texts)


def test_distances_by_hand(llama: Resident) -> None:
    """Tokens are bytes. "ab" and "cd" share none; of "ab" and "ac" one half is shared: each has half a bit for itself."""
    tokenizer = llama.tokenizer
    assert distance(tokenizer, rows("ab"), rows("ba", "abab")) == pytest.approx(0, abs=1e-12)
    assert distance(tokenizer, rows("ab"), rows("cd")) == pytest.approx(1)
    assert distance(tokenizer, rows("ab"), rows("ac")) == pytest.approx(0.5)
    p, q = 0.75, 0.25  # "aaab" against "abbb"
    half = p * math.log2(p / 0.5) + q * math.log2(q / 0.5)
    assert distance(tokenizer, rows("aaab"), rows("abbb")) == pytest.approx(half)
    assert distance(tokenizer, rows(""), rows("a")) == 0


def test_strangeness_by_hand(llama: Resident) -> None:
    """Tokens are bytes: of four own ones three are "a" and one is "b"; "c" was never seen."""
    whole = 4 + UNSEEN * len(llama.tokenizer)
    a, b, c = (-math.log((n + UNSEEN) / whole) for n in (3, 1, 0))
    found = strangeness(llama.tokenizer, rows("ab", "c", "", "aaa"), rows("aa", "ba"))
    assert found.tolist() == pytest.approx([(a + b) / 2, c, 0.0, a])
    assert strangeness(llama.tokenizer, rows("a"), ()).tolist() == pytest.approx([math.log(len(llama.tokenizer))])
    assert strangeness(llama.tokenizer, (), rows("a")).shape == (0,)


def test_a_template_s_own_words_are_no_likeness(llama: Resident) -> None:
    one, other = (Row(f"Read: {text} Mood:", "", frame=(6, 6)) for text in ("aa", "bb"))
    assert distance(llama.tokenizer, (one,), (other,)) == pytest.approx(1)


def server(base: Resident, template: str) -> Silo:
    return Silo("server", SiloData((), (), (), ("bad", "good"), {"template": template}), {"base": base}, 7)


def test_rows_that_the_base_writes(llama: Resident) -> None:
    wrote = generated(server(llama, "{text}\nMood:"), 5, "A review: ")
    assert len({row.prompt for row in wrote}) == 5
    assert all(row.prompt.endswith("\nMood:") and row.answer == "" for row in wrote)
    assert all(len(row.input) > 2 for row in wrote)
    assert generated(server(llama, "{text}\nMood:"), 5, "A review: ") == wrote, "the same for the same seed"


def test_a_template_of_two_fields_is_refused(llama: Resident) -> None:
    with pytest.raises(UserError, match="must have one field"):
        generated(server(llama, "{title}: {text}"), 5, "A review: ")
