"""The words of a text as numbers, and BM25 over them (Robertson & Zaragoza 2009), with statistics of all silos together.

A silo tells in how many of its passages each number occurs, not the word. Who knows a word can tell its number: that a silo has
it is no secret.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han letters: words without spaces between
WORD = re.compile(f"[{UNSPACED}]+|[^\\W{UNSPACED}]+")
UNSPACED_WORD = re.compile(f"[{UNSPACED}]")
K1, B = 1.2, 0.75  # how soon more of the same word counts no more; how much a long passage's words count less


def terms(text: str) -> Counter[int]:
    """How often each word occurs, without case and accents' ways of writing. Where no spaces part words, of each two letters."""
    found = Counter[int]()
    for word in WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        pairs = [word[i : i + 2] for i in range(len(word) - 1)] if UNSPACED_WORD.match(word) else []
        found.update(map(_number, pairs or [word]))
    return found


@lru_cache(maxsize=1 << 16)
def _number(word: str) -> int:
    """63 bits, which SQLite holds: of a million words any two are the same with a chance of 1 in 10 million."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) >> 1


def idf(passages: int, having: int) -> float:
    """Of a word that `having` of the passages have; never below 0."""
    return math.log1p((passages - having + 0.5) / (having + 0.5))
