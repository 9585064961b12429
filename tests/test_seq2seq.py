"""Encoder-decoders: what is scored and written equals plain transformers; batches; prefixes; what others load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import added, ahead, models, seq2seq
from fedtailor.answering import Encoded, encode, fresh
from fedtailor.data import Row
from fedtailor.errors import SiloError, UserError
from fedtailor.find import method as named
from fedtailor.methods.averaging import Adapted, Averaging
from fedtailor.methods.bitfit import BitFit
from fedtailor.methods.p_tuning import PTuning
from fedtailor.methods.prefix import Prefix
from fedtailor.methods.soft_prompt import SoftPrompt
from fedtailor.models import Base, Resident
from fedtailor.tuned import IGNORED, stack
from test_added import begun, loaded, moved

ROWS = (Row("Say tea:", "tea tea"), Row("Say a long parcel of words:", "a"), Row("x", "yes"))
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def plainly(module: Any, tokenizer: Any, row: Row, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities of each of the answer's tokens and its end, the tokens), one row at a time, from the labels alone."""
    labels = torch.tensor([[*tokenizer(answer).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([tokenizer(row.prompt).input_ids]), labels=labels).logits
    return logits[0].log_softmax(-1).gather(1, labels.T)[:, 0], labels[0]


def test_a_batch_is_padded_on_the_right() -> None:
    some = seq2seq.batch([Encoded([1, 2, 3], [4, 5]), Encoded([6], [7])], 9, 8)
    assert some.input_ids.tolist() == [[1, 2, 3], [6, 9, 9]]
    assert some.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert some.labels.tolist() == [[4, 5], [7, IGNORED]]
    assert some.decoder_ids.tolist() == [[8, 4], [8, 7]]
    other = seq2seq.batch([Encoded([1], [2]), Encoded([3], [4])], 9, 8)
    both = stack([some, other], 9)
    assert both.input_ids[1].tolist() == [[1, 9, 9], [3, 9, 9]]
    assert both.labels[1].tolist() == [[2, IGNORED], [4, IGNORED]]
    assert both.decoder_ids[1].tolist() == [[8, 9], [8, 9]]
    assert seq2seq.batch([Encoded([1], [])], 9, 8).decoder_ids.shape == (1, 0)


def test_log_probabilities_are_those_of_plain_labels(t5: Resident, plain: Callable[[str], Any]) -> None:
    found = fresh(t5).logprobs(ROWS)
    for (total, count), row in zip(found, ROWS, strict=True):
        expected, tokens = plainly(plain("t5"), t5.tokenizer, row, row.answer)
        assert count == len(tokens)
        assert total == pytest.approx(expected.sum().item(), abs=1e-4)


def test_label_words_are_scored_with_their_end(t5: Resident, plain: Callable[[str], Any]) -> None:
    scores = fresh(t5).scores(ROWS, ["a", "ab"])
    for i, row in enumerate(ROWS):
        for j, choice in enumerate(["a", "ab"]):
            expected = plainly(plain("t5"), t5.tokenizer, row, choice)[0].sum().item()
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-4)


def test_it_writes_what_transformers_writes(t5: Resident, plain: Callable[[str], Any]) -> None:
    """Greedy, all rows in one batch, against one row at a time by `generate`."""
    told = fresh(t5).generate(ROWS, max_new_tokens=9)
    for text, row in zip(told, ROWS, strict=True):
        ids = torch.tensor([t5.tokenizer(row.prompt).input_ids])
        theirs = plain("t5").generate(input_ids=ids, max_new_tokens=9, do_sample=False, num_beams=1)
        assert text == t5.tokenizer.decode(theirs[0], skip_special_tokens=True).strip()


MADE = [Prefix(virtual_tokens=3), SoftPrompt(virtual_tokens=3), PTuning(virtual_tokens=3), BitFit()]


@pytest.mark.parametrize("method", MADE, ids=lambda m: type(m).__name__)
def test_writing_with_a_cache_is_reading_it_all(t5: Resident, method: Averaging) -> None:
    """What is written piece by piece is the likeliest by a pass over all of it, and a stream says the same."""
    model = Adapted(method, moved(begun(t5, method))).open({"base": t5})
    (item,) = encode(t5, ROWS[:1], [""], stop=False)
    told = [t5.module.config.decoder_start_token_id]
    ids = torch.tensor([item.prompt])
    for _ in range(9):
        with torch.no_grad():
            logits = model.tuned.using(model.tensors, ids, torch.ones_like(ids), torch.tensor([told]))[0]
        told.append(int(logits[0, -1].argmax()))
        if told[-1] == t5.tokenizer.eos_token_id:
            break
    text = t5.tokenizer.decode(told[1:], skip_special_tokens=True)
    assert model.generate(ROWS, max_new_tokens=9)[0] == text.strip()
    assert "".join(model.stream(ROWS[0], **GREEDY)).strip() == text.rstrip("\ufffd").strip()


def test_rows_too_long(t5: Resident) -> None:
    message = "a row has 510 tokens beside 3 virtual tokens and 3 of answer, the model's context is 512 of each"
    with pytest.raises(SiloError, match=message):
        Adapted(SoftPrompt(virtual_tokens=3), {}).open({"base": t5}).logprobs([Row("x" * 510, "no")])
    with pytest.raises(SiloError, match="and 513 of answer"):
        fresh(t5).logprobs([Row("x", "y" * 512)])
    fresh(t5).logprobs([Row("x" * 512, "y" * 511)])
    with pytest.raises(UserError, match="leaves no room in a context of 512"):
        SoftPrompt(virtual_tokens=512).put_on(t5, 0)


def test_layers_of_both_halves_are_found(t5: Resident) -> None:
    assert added.blocks(t5.plan) == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert len(ahead.attentions(t5.plan)) == 2 + 2 * 2
    short = {n: kind for n, kind in t5.plan.items() if not n.startswith("decoder.block.1")}
    assert added.blocks(short) == ("encoder.block.0", "encoder.block.1", "decoder.block.0")
    assert not any(name.endswith("/k") for name in BitFit().put_on(t5, 0).names())


def test_a_prefix_is_what_its_text_is(t5: Resident) -> None:
    """The encoder's first layer, where its keys do not depend on positions: its own keys for the text's tokens."""
    method = Prefix(virtual_tokens=3, init_text="abc")
    tensors = begun(t5, method)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in method.put_on(t5, 0).tensors().items()}
    first = t5.module.encoder.block[0].layer[0]
    with torch.no_grad():
        keys = first.SelfAttention.k(first.layer_norm(t5.module.shared(torch.tensor(t5.tokenizer("abc").input_ids))))
    assert torch.allclose(tensors["added.encoder/block/0/layer/0/SelfAttention/key"], keys, atol=1e-6)
    with pytest.raises(UserError, match="projection: an encoder-decoder takes a flat prefix"):
        replace(method, projection=True).put_on(t5, 0)


def told(module: Any, t5: Resident, row: Row) -> float:
    return float(plainly(module, t5.tokenizer, row, row.answer)[0].sum())


@pytest.mark.parametrize("name", ["lora", "ia3", "vera", "layernorm", "peft"])
def test_plain_peft_loads_it(t5: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    method = named(name)()
    tensors = moved(begun(t5, method))
    method.export(t5, tensors, tmp_path)
    theirs = PeftModel.from_pretrained(plain("t5"), tmp_path).eval()
    ours = Adapted(method, tensors).open({"base": t5}).logprobs(ROWS)
    assert [told(theirs, t5, row) for row in ROWS] == pytest.approx([total for total, _ in ours], abs=1e-3)
    bare = fresh(t5).logprobs(ROWS)
    assert [total for total, _ in bare] != pytest.approx([total for total, _ in ours], abs=1e-2)


@pytest.mark.parametrize("name", ["prefix", "bitfit", "adapter", "soft_prompt", "p_tuning"])
def test_the_folder_brings_its_own_loader(t5: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    method = named(name)()
    tensors = moved(begun(t5, method))
    method.export(t5, tensors, tmp_path)
    ours = Adapted(method, tensors).open({"base": t5}).logprobs(ROWS)
    module = loaded(tmp_path).load(plain("t5"), tmp_path)
    assert [told(module, t5, row) for row in ROWS] == pytest.approx([total for total, _ in ours], abs=1e-3)
    bare = fresh(t5).logprobs(ROWS)
    assert [total for total, _ in bare] != pytest.approx([total for total, _ in ours], abs=1e-2)


@pytest.mark.parametrize("name", ["soft_prompt", "p_tuning"])
def test_it_writes_in_plain_transformers_too(t5: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """With rows of unequal length in one batch, so that a mask counts."""
    method = named(name)()
    tensors = moved(begun(t5, method))
    method.export(t5, tensors, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["added.safetensors", "load.py"]
    module = loaded(tmp_path).load(plain("t5"), tmp_path)
    read = t5.tokenizer([row.prompt for row in ROWS], return_tensors="pt", padding=True, padding_side="right")
    ids, mask = read.input_ids, read.attention_mask
    said = module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=1)
    texts = [text.strip() for text in t5.tokenizer.batch_decode(said, skip_special_tokens=True)]
    assert texts == Adapted(method, tensors).open({"base": t5}).generate(ROWS, max_new_tokens=9)


def test_a_folder_of_a_base(t5: Resident, tmp_path: Path) -> None:
    """Saved by full fine-tuning, it is found to be an encoder-decoder, its weights those that were trained."""
    method = named("full")()
    tensors = {n: t * 1.01 for n, t in begun(t5, method).items()}
    method.export(t5, tensors, tmp_path)
    base = models.load(Base(str(tmp_path), "float32"))
    assert (base.kind, base.context, base.classifier) == ("seq2seq", 512, False)
    ours = Adapted(method, tensors).open({"base": t5}).logprobs(ROWS)
    theirs = fresh(base).logprobs(ROWS)
    assert [total for total, _ in theirs] == pytest.approx([total for total, _ in ours], abs=1e-4)
