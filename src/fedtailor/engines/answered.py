"""What a silo's end says, before any of it goes on to the program: whatever it is, it costs that silo's own answer alone."""

from __future__ import annotations

import json
from typing import Any

from fedtailor.engines.frames import BODY_LIMIT, HEAD_LIMIT
from fedtailor.errors import printable

FLAT = HEAD_LIMIT // 2  # bytes as it goes on, where letters are escaped; the rest is for what is around it


def answered(text: str | bytes) -> tuple[dict[str, Any], int]:
    """From JSON: its worker's head, or why there is none (`lost`), and the size of the reply. Nothing else of it goes on:
    whose answer it is, and to which exchange, is not the silo's to say. Texts without what a terminal would obey, numbers
    that are JSON's. Raises ValueError in one line."""
    try:
        return _answered(text)
    except RecursionError as error:  # of reading it, or of telling what is wrong with it
        raise ValueError(f"a head that is too deep: {error}") from None


def _answered(text: str | bytes) -> tuple[dict[str, Any], int]:
    said = json.loads(text) if len(text) <= HEAD_LIMIT else None
    if not isinstance(said, dict):
        raise ValueError(f"a head of {len(text)} letters that is no JSON object, or over the limit of {HEAD_LIMIT}")
    size, lost = said.get("size", 0), printable(said.get("lost", ""))
    if type(size) is not int or not 0 <= size <= BODY_LIMIT:
        raise ValueError(f"it announced a reply of {size!r:.30} bytes; the limit is {BODY_LIMIT}")
    head = said.get("head", {} if lost else None)
    if not isinstance(head, dict) or any(isinstance(value, dict | list) for value in head.values()):
        raise ValueError("its head is no flat table")  # nor is a deep one: the program could not read it
    flat = {printable(key): printable(value) if isinstance(value, str) else value for key, value in head.items()}
    length = len(json.dumps(flat, allow_nan=False))  # raises ValueError for NaN and Infinity, also where 1e999 is one
    if length > FLAT:
        raise ValueError(f"its head takes {length} bytes; the limit is {FLAT}")
    return {"head": flat, "lost": lost}, size
