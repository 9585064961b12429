"""Sections -> passages that an embedder reads whole: at most so many of its tokens, cut where sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedtailor.retrieval.reading import Document

SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
LETTERS = 10  # of a token, at most, on the whole


@dataclass(frozen=True)
class Passage:
    section: str  # the headings that it stands under, from the title down
    text: str

    @property
    def indexed(self) -> str:
        """What is embedded and counted: the headings say what a passage is about, as it often does not itself."""
        return f"{self.section}\n{self.text}"


def cut(document: Document, tokenizer: Any, size: int, overlap: int) -> Iterator[Passage]:
    """Passages of at most `size` tokens, headings included, which take half of it at most. The last sentences of one, up to
    `overlap` tokens, begin the next one of the same section."""
    for section in document.sections:
        head = _first(section.name, tokenizer, size // 2)
        room = size - len(_spans(head + "\n", tokenizer))
        held, total = list[tuple[str, int]](), 0
        for sentence, count in _sentences(section.text, tokenizer, room):
            if held and total + count > room:
                yield Passage(head, " ".join(text for text, _ in held))
                while held and (total > overlap or total + count > room):
                    total -= held.pop(0)[1]
            held.append((sentence, count))
            total += count
        if held:
            yield Passage(head, " ".join(text for text, _ in held))


def _sentences(text: str, tokenizer: Any, room: int) -> Iterator[tuple[str, int]]:
    """Each with its tokens; one that is longer than `room` in parts. `LETTERS` letters count as a token at least: a word that the
    tokenizer does not know is one token, however long it is."""
    for sentence in filter(None, (part.strip() for part in SENTENCE.split(text))):
        for window in _windows(sentence, LETTERS * room):
            spans = _spans(window, tokenizer)
            for i in range(0, max(len(spans), 1), room):
                end = spans[i + room][0] if i + room < len(spans) else len(window)
                part = window[spans[i][0] if i else 0 : end].strip()
                if part:
                    yield part, max(min(room, len(spans) - i), -(-len(part) // LETTERS))


def _windows(text: str, most: int) -> Iterator[str]:
    """Of at most so many letters, cut at a space where there is one: a tokenizer needs not see megabytes at once."""
    begin = 0
    while begin < len(text):
        end = begin + most
        if end < len(text) and (space := text.rfind(" ", begin + most // 2, end)) > 0:
            end = space
        yield text[begin:end]
        begin = end


def _first(text: str, tokenizer: Any, most: int) -> str:
    """As much of its beginning as has at most so many tokens, and at least a letter."""
    spans = _spans(text[: LETTERS * most], tokenizer)
    within = text[: LETTERS * most]
    return within if len(spans) <= most else within[: max(1, spans[most][0])].rstrip() or within[:1]


def _spans(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    return told["offset_mapping"]  # type: ignore[no-any-return]
