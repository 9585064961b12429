"""What is said in one tokenizer's tokens, told in another's: a silo with a tokenizer of its own takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, trainers
from tokenizers import models as kinds
from tokenizers.pre_tokenizers import ByteLevel

from fedtailor import distilling, models, wire
from fedtailor.answering import Answers
from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.methods.distill import Distill
from fedtailor.models import Base, Resident
from fedtailor.studying import Spoken, translated

ROWS = tuple(Row(f"The {thing} was", "here at last") for thing in ("parcel", "green boat", "old bear", "cup of tea"))
METHOD = Distill(
    trainer={"name": "lora", "rank": 2, "lr": 0.02, "local_steps": 2, "batch_size": 2}, public_rows=4, digest_steps=2, top=6
)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose tokenizer joins bytes to words: "Ġhere", "Ġat" and "Ġlast" are a token each."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["It is here at last. here at last, here at last"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=len(fast), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=512, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("merged")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def other(merged: Path) -> Resident:
    return models.load(Base(str(merged), "float32"))


def test_the_same_tokenizer_says_the_same(llama: Resident) -> None:
    said = distilling.said(Answers(llama, llama.tuned(), None), ROWS, (), 6, 1.0)
    found, spoken = translated(said, ROWS, llama, llama)
    assert torch.equal(found.ids, said.ids)
    assert torch.equal(found.logp, said.logp)
    assert spoken.all()


def test_places_by_hand(llama: Resident, other: Resident) -> None:
    """Of "here at last": one says Ġhere Ġat Ġlast and the end, the other 13 bytes and the end. Of the bytes h, a, l and the
    end begin where a token of the first begins; the space in front does not: a token's own space is no part of its span."""
    row = [ROWS[0]]
    assert distilling.places(other, row, ()) == [4]
    assert distilling.places(llama, row, ()) == [14]
    said = distilling.said(Answers(other, other.tuned(), None), row, (), 6, 1.0)
    _, spoken = translated(said, row, other, llama)
    assert len(spoken) == 14
    at = spoken.nonzero()[:, 0].tolist()
    assert set(at) <= {1, 6, 9, 13}
    assert at
    said = distilling.said(Answers(llama, llama.tuned(), None), row, (), 6, 1.0)
    back, heard = translated(said, row, llama, other)
    assert back.ids.shape == (4, 6)
    assert heard.any()


def test_a_silo_with_another_tokenizer_takes_part(
    llama: Resident, merged: Path, written: Mapping[str, SiloData]
) -> None:
    """Where it is asked for; without, it is told before the run, and, where a federation finds it out later, counted."""
    first = next(iter(written))
    data = {**written, first: replace(written[first], settings={"model": Base(str(merged), "float32")})}
    with pytest.raises(UserError, match=rf"\[silo.{first}\] model: its tokenizer is not the student's; set method.align = true"):
        METHOD.ready(llama, data)
    one = InProcess(data, {"base": llama}, public=SiloData(ROWS, (), ()), rounds=2)
    state = METHOD.round(METHOD.begin(one.reach(0)), one.reach(1))
    assert [(silo, "set method.align = true" in why) for _, silo, why in one.rejected] == [(first, True)]
    assert state.known.all()

    method = replace(METHOD, align=True)
    method.ready(llama, data)
    one = InProcess(data, {"base": llama}, public=SiloData(ROWS, (), ()), rounds=2)
    heard = list[Spoken]()
    one.record = lambda silo, way, body: (
        heard.append(found) if silo == first and isinstance(found := wire.unpack(body), Spoken) else None
    )
    state = method.begin(one.reach(0))
    for number in (1, 2):  # in the second it learns what the others said
        state = method.round(state, one.reach(number))
        one.commit()
    assert one.rejected == []
    assert [len(body.spoken) for body in heard] == [56, 56]
    assert all(0 < int(body.spoken.sum()) <= 16 for body in heard), "of places within its tokens it does not speak"
    assert torch.isfinite(torch.tensor(state.notes["student_loss"]))
