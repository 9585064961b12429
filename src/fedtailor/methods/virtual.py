"""What methods with virtual tokens share: the room they take, the text they start from."""

from __future__ import annotations

from typing import Any

from fedtailor.errors import UserError
from fedtailor.models import Resident


def room(count: int, resident: Resident) -> int:
    """`count`, where it leaves room for a row. Raises UserError."""
    if count >= resident.context:
        raise UserError(f"[method] virtual_tokens = {count} leaves no room in a context of {resident.context} tokens")
    return count


def prompted(resident: Resident) -> dict[str, Any]:
    """Settings of PEFT for embeddings in front of a text: of an encoder-decoder's, the encoder's alone."""
    if resident.kind != "seq2seq":
        return {"task_type": resident.task}
    module = resident.module
    # PEFT 0.21 asks for this method by the name that it had before transformers 5
    if not hasattr(module, "_prepare_encoder_decoder_kwargs_for_generation"):
        module._prepare_encoder_decoder_kwargs_for_generation = module._prepare_text_encoder_decoder_kwargs_for_generation
    return {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}


def begins(text: str, count: int, resident: Resident) -> list[int]:
    """The text's token ids, repeated or cut to `count`."""
    ids = resident.tokenizer(text, add_special_tokens=False).input_ids
    return list((ids * (count // len(ids) + 1))[:count])


def instruction(text: str) -> None:
    """Raises ValueError for a text of white space."""
    if text and not text.strip():
        raise ValueError("init_text is only white space; write an instruction, or leave it empty for a random start")
