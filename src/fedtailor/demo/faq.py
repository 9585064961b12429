"""Questions of five software communities and the answers from their own FAQs."""

from __future__ import annotations

from typing import Any

from fedtailor.demo import _faq

DESCRIPTION = "about 1,050 questions with answers; 6 silos: perl, python, debian, r, tools, lsof; see faq_passages"
LICENCE = _faq.LICENCE


def build() -> list[dict[str, Any]]:
    return rows(_faq.collect()[0])


def rows(answers: list[_faq.Answer]) -> list[dict[str, Any]]:
    """Columns: silo, section, question, answer, source, id."""
    return [
        {"silo": a.silo, "section": a.section, "question": a.question, "answer": a.answer, "source": a.source, "id": a.id}
        for a in answers
    ]
