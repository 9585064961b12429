"""The random models: the same at every making, one token per byte, all architectures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.models import Resident
from fedtailor.tiny import KINDS, byte_tokenizer, tiny

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40))
def test_a_token_is_a_byte_and_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert all(0 <= i < 256 for i in ids)
    assert TOKENIZER.decode(ids) == text


def test_marks() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (256, 257, 258)
    assert len(TOKENIZER) == 259
    assert TOKENIZER.decode([256, 257], skip_special_tokens=True) == ""


def test_chat_template() -> None:
    said = TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "user: hi\nassistant:"


@pytest.mark.parametrize("architecture", KINDS)
def test_every_making_is_the_same_and_draws_on_no_one_elses_dice(architecture: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = tiny("float32", architecture)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert tiny("float32", architecture).sha256 == first.sha256
    assert first.kind == KINDS[architecture]
    assert first.classifier == (architecture in ("bert", "vit"))
    assert not any(p.requires_grad for p in first.module.parameters())


def test_the_architectures_are_what_they_say(any_resident: Resident) -> None:
    config = any_resident.module.config
    assert config.model_type in {"llama", "gpt2", "bert"}
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
    assert any_resident.context == 512


def test_dtype() -> None:
    assert tiny("bfloat16").module.dtype == torch.bfloat16
    assert tiny("float32").module.dtype == torch.float32
