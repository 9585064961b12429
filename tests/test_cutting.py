"""Sections into passages: nothing lost, nothing too long, headings kept. Tokens of the tiny models are letters."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from fedtailor.retrieval.cutting import cut
from fedtailor.retrieval.reading import Document, Section
from fedtailor.tiny import tiny

TOKENIZER = tiny("float32", "llama").tokenizer


def passages(text: str, size: int, overlap: int = 0, headings: tuple[str, ...] = ("T",)) -> list[tuple[str, str]]:
    document = Document("a.txt", "", (Section(headings, text),))
    return [(one.section, one.text) for one in cut(document, TOKENIZER, size, overlap)]


def test_by_hand() -> None:
    """The heading and its line take 2 of 12 letters: two sentences of 4 fit in, and a third does not."""
    assert passages("Abc. Def. Ghi.", 12) == [("T", "Abc. Def."), ("T", "Ghi.")]
    assert passages("Abc. Def. Ghi.", 12, overlap=4) == [("T", "Abc. Def."), ("T", "Def. Ghi.")]
    assert passages("Abc.\n\nDef.", 40) == [("T", "Abc. Def.")]
    assert passages("", 12) == []


def test_a_sentence_that_is_too_long_is_cut_within() -> None:
    assert passages("abcdefghijklmnop", 12) == [("T", "abcdefghij"), ("T", "klmnop")]


def test_chinese_sentences_end_without_a_space() -> None:
    found = passages("\u8fd9\u662f\u3002\u4f60\u597d\u3002\u518d\u89c1\u3002", 24)
    assert [text for _, text in found] == ["\u8fd9\u662f\u3002 \u4f60\u597d\u3002", "\u518d\u89c1\u3002"]


def test_a_word_that_is_one_token_is_cut_by_its_letters() -> None:
    """And a line of megabytes in less than time that grows with its square: the tokenizer never sees more than a window."""

    class OneToken:
        longest = 0

        def __call__(self, text: str, **_: object) -> dict[str, list[tuple[int, int]]]:
            self.longest = max(self.longest, len(text))
            return {"offset_mapping": [(0, len(text))] if text else []}

    tokenizer, text = OneToken(), "x" * 300_000
    found = [one.text for one in cut(Document("a", "", (Section(("T",), text),)), tokenizer, 50, 0)]
    assert "".join(found) == text
    assert max(map(len, found)) <= 500
    assert tokenizer.longest <= 500


def test_long_headings_take_half_at_most() -> None:
    ((section, text),) = passages("Abc.", 20, headings=("A very long title", "and more of it"))
    assert section == "A very lon"
    assert text == "Abc."


@given(
    st.lists(st.text("abc.!? ", min_size=1, max_size=40), max_size=8).map("\n".join), st.integers(8, 60), st.integers(0, 20),
    st.text("xyz", min_size=1, max_size=30),
)  # fmt: skip
def test_nothing_is_lost_and_nothing_too_long(text: str, size: int, overlap: int, heading: str) -> None:
    found = passages(text, size, min(overlap, size // 4), (heading,))
    assert all(len(f"{section}\n{part}") <= size + part.count(" ") for section, part in found)
    assert all(heading.startswith(section) for section, _ in found)
    rest = "".join(part for _, part in found)
    for word in re.findall(r"[abc]+", text):
        if len(word) <= 2:
            assert word in rest
    if min(overlap, size // 4) == 0:
        assert re.sub(r"\s", "", rest) == re.sub(r"\s", "", text)
