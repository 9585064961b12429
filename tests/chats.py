"""A tiny model with a chat template and the marks of one, for tests of what is put into a prompt."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken

from fedtailor import models
from fedtailor.answering import encode
from fedtailor.data import Row
from fedtailor.models import Resident
from fedtailor.tiny import _module, byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
OURS = ("<|im_start|>", "<|im_end|>", "<file_sep>", "[TOOL]", "<call>", "«end»")


def chat_tokenizer(template: str = CHATML) -> Any:
    """Bytes, with marks as chat models have them: some in its list of special tokens, some in its vocabulary alone."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(OURS[:2])})
    tokenizer.add_tokens([AddedToken(mark, special=mark != "<call>", normalized=False) for mark in OURS[2:]])
    tokenizer.add_tokens(["aspirin"])
    tokenizer.chat_template = template
    return tokenizer


def chat_model() -> Resident:
    """Of such a tokenizer, with room for 4,000 tokens, and weights so large that it says something, and that a prompt matters."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        module, tokenizer = _module("llama"), chat_tokenizer()
        module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for name, weight in module.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(8)
    module.config.max_position_embeddings = 4000
    return models.resident(module, tokenizer, source="tiny", kind="causal")


def tokens(resident: Resident, asked: Row) -> list[int]:
    """Of what it reads of a row."""
    return encode(resident, [asked], [""], stop=False)[0].prompt
