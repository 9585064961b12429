"""Writing a one-line synopsis: what a Debian package's long description says -> its maintainer's own line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fedtailor.demo import _debian, split_of

DESCRIPTION = "about 8,800 texts of at most 70 words and a one-line synopsis of each; 16 silos: Debian's sections"
LICENCE = _debian.LICENCE

SILOS = frozenset({
    "admin", "database", "devel", "editors", "electronics", "games", "graphics", "mail", "math", "net", "science",
    "sound", "text", "utils", "video", "web",
})
MAX_WORDS = 70
MIN_CHARACTERS = 40


def build() -> list[dict[str, Any]]:
    return rows(_debian.packages())


def rows(packages: Iterable[_debian.Package]) -> list[dict[str, Any]]:
    """Columns: id, silo, split, input, output, package. Sections of fewer than a hundred packages are left out."""
    return [
        {
            "id": p.name,
            "silo": p.section,
            "split": split_of(p.name),
            "input": shortened(p.text),
            "output": p.synopsis,
            "package": p.name,
        }
        for p in packages
        if p.section in SILOS
    ]


def shortened(text: str) -> str:
    """The first sentences that fit; where that is next to nothing, the first words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        if len(kept) + len(words) > MAX_WORDS:
            break
        kept += words
    short = " ".join(kept)
    return short if len(short) >= MIN_CHARACTERS else " ".join(text.split()[:MAX_WORDS])
