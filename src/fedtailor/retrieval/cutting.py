"""Sections -> passages that an embedder reads whole: at most so many of its tokens, cut where sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedtailor.retrieval.reading import Document

SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")


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
        room = size - _count(head + "\n", tokenizer)
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
    """Each with its tokens; one that is longer than `room` in parts."""
    for sentence in filter(None, (part.strip() for part in SENTENCE.split(text))):
        rest = sentence
        while rest:
            part = _first(rest, tokenizer, room)
            yield part, max(1, _count(part, tokenizer))
            rest = rest[len(part) :].strip()


def _first(text: str, tokenizer: Any, most: int) -> str:
    """As much of its beginning as has at most so many tokens, and at least a letter."""
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    spans = told["offset_mapping"]
    return text if len(spans) <= most else text[: max(1, spans[most][0])].rstrip() or text[:1]


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
