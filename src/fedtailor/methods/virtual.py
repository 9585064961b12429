"""What methods with virtual tokens share: the room they take, the text they start from."""

from __future__ import annotations

from fedtailor.errors import UserError
from fedtailor.models import Resident


def room(count: int, resident: Resident) -> int:
    """`count`, where it leaves room for a row. Raises UserError."""
    if count >= resident.context:
        raise UserError(f"[method] virtual_tokens = {count} leaves no room in a context of {resident.context} tokens")
    return count


def begins(text: str, count: int, resident: Resident) -> list[int]:
    """The text's token ids, repeated or cut to `count`."""
    ids = resident.tokenizer(text, add_special_tokens=False).input_ids
    return list((ids * (count // len(ids) + 1))[:count])


def instruction(text: str) -> None:
    """Raises ValueError for a text of white space."""
    if text and not text.strip():
        raise ValueError("init_text is only white space; write an instruction, or leave it empty for a random start")
