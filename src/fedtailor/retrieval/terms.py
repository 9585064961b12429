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

WORD = re.compile(r"\w+", re.UNICODE)
K1, B = 1.2, 0.75  # how soon more of the same word counts no more; how much a long passage's words count less


def terms(text: str) -> Counter[int]:
    """How often each word occurs, without case and accents' ways of writing."""
    return Counter(map(_number, WORD.findall(unicodedata.normalize("NFKC", text).casefold())))


@lru_cache(maxsize=1 << 16)
def _number(word: str) -> int:
    """63 bits, which SQLite holds: of a million words any two are the same with a chance of 1 in 10 million."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) >> 1


def idf(passages: int, having: int) -> float:
    """Of a word that `having` of the passages have; never below 0."""
    return math.log1p((passages - having + 0.5) / (having + 0.5))
