"""What there is to search in for the questions of `faq`: their answers in passages, among pages of manuals."""

from __future__ import annotations

from typing import Any

from fedtailor.demo import _faq

DESCRIPTION = "about 2,100 passages of at most 220 words, the answers of faq among them; the same 6 silos"
LICENCE = _faq.LICENCE


def build() -> list[dict[str, Any]]:
    return rows(_faq.collect()[1])


def rows(passages: list[_faq.Passage]) -> list[dict[str, Any]]:
    """Columns: pid, silo, source, document (the id of the question it answers, else its source), section, text, qa_id (that
    question, or null). No passage has the heading that asks."""
    return [
        {
            "pid": p.id, "silo": p.silo, "source": p.source, "document": p.answers or p.source, "section": p.section,
            "text": p.text, "qa_id": p.answers,
        }
        for p in passages
    ]
