"""Scores and text from padded batches: the same as row by row, and the same as plain transformers computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import answering, progress
from fedtailor.answering import Answers, Encoded, batch, class_batch, encode, encode_classes, fresh
from fedtailor.baselines import Bare
from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import SiloError
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident
from fedtailor.tuned import IGNORED

ROWS = [
    Row("a", "b", "1"),
    Row("A rather longer prompt, with a few words in it.", "yes", "2"),
    Row("Some words", "a longer answer", "3"),
    Row("Ends in white space\n", "no", "4"),
    Row("Ünïcödé ☃", "ok", "5"),
]
CHOICES = ["good", "bad", "so-so"]
METHODS: list[Averaging | None] = [
    None, Prefix(virtual_tokens=3), Prefix(virtual_tokens=3, projection=True, projection_size=8), Lora(rank=2),
]  # fmt: skip


def name(method: Averaging | None) -> str:
    return "bare" if method is None else type(method).__name__ + "-projected" * getattr(method, "projection", False)


def opened(resident: Resident, method: Averaging | None, labels: int = 0) -> Answers:
    """A model whose tensors are well away from their start, so that they matter."""
    if method is None:
        return fresh(resident, None, labels)
    tuned = method.put_on(resident, labels)
    dice = torch.Generator().manual_seed(4)
    start = method.initial(resident, tuned, 0)
    tuned = method.put_on(resident, labels)
    return Answers(resident, tuned, {n: t + 0.2 * torch.randn(t.shape, generator=dice) for n, t in start.items()})


def by_hand(plain: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Log-probability of the answer by plain transformers, without padding."""
    with torch.no_grad():
        logp = plain(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def test_encode_joins_with_one_space_and_ends(llama: Resident) -> None:
    end = 257
    ids = lambda text: llama.tokenizer(text).input_ids  # noqa: E731
    open_, space = encode(llama, [Row("a:", "b"), Row("a:\n", "b")], stop=True)
    assert (open_.prompt, open_.answer) == (ids("a:"), [*ids(" b"), end])
    assert (space.prompt, space.answer) == (ids("a:\n"), [*ids("b"), end])
    assert encode(llama, [Row("a:", "b")], stop=False)[0].answer == ids(" b")
    assert encode(llama, [Row("a:", "b")], ["c"], stop=False)[0].answer == ids(" c")
    assert encode(llama, [Row("", "b")], stop=False)[0].prompt == [end], "something must come before the first token"
    assert encode(llama, [], stop=True) == []


def test_batch_by_hand() -> None:
    made = batch([Encoded([1, 2], [3]), Encoded([4], [5, 6, 7])], 0)
    assert made.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert made.position_ids.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert made.labels.tolist() == [[IGNORED, IGNORED, 3], [5, 6, 7]]


def test_class_batch_by_hand(bert: Resident) -> None:
    items = encode_classes(bert, [Row("ab", "good"), Row("abc", "bad")], ["bad", "good"])
    made = class_batch(items, 256)
    assert made.labels.tolist() == [1, 0]
    assert made.attention_mask.sum(1).tolist() == [2, 3]


@pytest.mark.parametrize("stop", [True, False])
def test_logprobs_against_plain_transformers(causal: Resident, plain: Callable[[str], Any], stop: bool) -> None:
    module = plain(causal.module.config.model_type)
    found = fresh(causal).logprobs(ROWS, stop=stop)
    for item, (total, count) in zip(encode(causal, ROWS, stop=stop), found, strict=True):
        assert count == len(item.answer)
        assert total == pytest.approx(by_hand(module, item.prompt, item.answer), abs=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_padded_batches_score_as_one_row_at_a_time(causal: Resident, method: Averaging | None) -> None:
    model = opened(causal, method)
    together, apart = model.logprobs(ROWS), [model.logprobs([row])[0] for row in ROWS]
    for (a, n), (b, m) in zip(together, apart, strict=True):
        assert n == m
        assert a == pytest.approx(b, abs=1e-4)
    scores = torch.cat([model.scores([row], CHOICES) for row in ROWS])
    assert torch.allclose(model.scores(ROWS, CHOICES), scores, atol=1e-4)
    assert scores.std(dim=0).min() > 1e-3, "rows that score alike would prove nothing"


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_padded_batches_write_as_one_row_at_a_time(causal: Resident, method: Averaging | None) -> None:
    model = opened(causal, method)
    assert model.generate(ROWS, max_new_tokens=12) == [model.generate([r], max_new_tokens=12)[0] for r in ROWS]


@pytest.mark.parametrize("method", [None, Prefix(virtual_tokens=3), Lora(rank=2)], ids=name)
def test_an_encoder_scores_as_one_row_at_a_time(bert: Resident, method: Averaging | None) -> None:
    model = opened(bert, method or Lora(rank=1), 3)
    together = model.scores(ROWS, CHOICES)
    assert torch.allclose(together, torch.cat([model.scores([row], CHOICES) for row in ROWS]), atol=1e-4)
    assert torch.allclose(together.exp().sum(1), torch.ones(len(ROWS)), atol=1e-5)
    assert together.std(dim=0).min() > 1e-3


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), places=st.sampled_from([1, 100, 1024]))
def test_no_order_and_no_batch_size_changes_a_score(lengths: list[int], places: int) -> None:
    from fedtailor.models import Base, load

    model = fresh(load(Base("tiny", "float32")))
    rows = [Row(chr(97 + i) * n, "x" * (1 + n % 3)) for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "PLACES", places)
        found = model.logprobs(rows)
        backwards = model.logprobs(rows[::-1])[::-1]
    alone = [model.logprobs([row])[0] for row in rows]
    for a, b, c in zip(found, backwards, alone, strict=True):
        assert a[0] == pytest.approx(c[0], abs=1e-4)
        assert b[0] == pytest.approx(c[0], abs=1e-4)


def test_many_rows_are_cut_into_batches_of_bounded_size(llama: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "PLACES", 64)
    items = [Encoded([1] * n, []) for n in (3, 30, 10, 100, 20, 5)]
    cut = list(answering._by_length(items, "scoring"))
    assert sorted(i for some in cut for i in some) == list(range(6))
    assert all(len(some) == 1 or max(len(items[i]) for i in some) * len(some) <= 64 for some in cut)
    assert cut[0] == [3], "the longest first"


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_what_rows_begin_with_in_common_is_read_once(
    causal: Resident, method: Averaging | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = "Answer briefly. Text: fine. Mood: good\n\nText: cold. Mood: bad\n\n"
    assert len(before) > answering.SHARED
    model = replace(opened(causal, method), told=lambda row: replace(row, prompt=before + row.prompt))
    read = []
    using = model.tuned.using
    with monkeypatch.context() as patch:
        patch.setattr(model.tuned, "using", lambda t, ids, *rest: read.append(tuple(ids.shape)) or using(t, ids, *rest))
        shared = model.logprobs(ROWS), model.scores(ROWS, ["a", "b"]), model.scores(ROWS, CHOICES)
    pieces = [width for rows, width in read if rows == 1]
    assert pieces
    assert all(answering.SHARED <= width <= len(before) for width in pieces)
    monkeypatch.setattr(answering, "SHARED", 10**6)
    one_by_one = model.logprobs(ROWS), model.scores(ROWS, ["a", "b"]), model.scores(ROWS, CHOICES)
    assert [n for _, n in shared[0]] == [n for _, n in one_by_one[0]]
    assert torch.allclose(torch.tensor(shared[0]), torch.tensor(one_by_one[0]), atol=1e-4)
    assert torch.allclose(shared[1], one_by_one[1], atol=1e-4)
    assert torch.allclose(shared[2], one_by_one[2], atol=1e-4)


def test_equal_rows_share_all_but_what_is_scored(causal: Resident) -> None:
    row = Row("the very same prompt, longer than what must be shared", "yes")
    model = fresh(causal)
    alone = model.logprobs([row])[0]
    assert model.logprobs([row] * 3) == [pytest.approx(alone, abs=1e-4)] * 3
    assert torch.allclose(model.scores([row] * 3, ["a", "b"]), model.scores([row], ["a", "b"]), atol=1e-4)


def test_before_is_part_of_the_prompt(causal: Resident) -> None:
    model = Bare("Well. ").open({"base": causal})
    told = [Row("Well. " + row.prompt, row.answer) for row in ROWS]
    bare = fresh(causal)
    assert model.logprobs(ROWS) == bare.logprobs(told)
    assert torch.equal(model.scores(ROWS, CHOICES), bare.scores(told, CHOICES))
    lines = [Row("Yes or no?\n", "")]  # its choices are of one token
    assert torch.equal(model.scores(lines, ["y", "n"]), bare.scores([Row("Well. Yes or no?\n", "")], ["y", "n"]))
    assert model.generate(ROWS) == bare.generate(told)


def test_choices_of_several_tokens_are_summed(causal: Resident, plain: Callable[[str], Any]) -> None:
    module = plain(causal.module.config.model_type)
    scores = fresh(causal).scores(ROWS[:2], CHOICES)
    for row, found in zip(ROWS[:2], scores, strict=True):
        for choice, score in zip(CHOICES, found.tolist(), strict=True):
            ids = causal.tokenizer(f" {choice}").input_ids
            assert len(ids) > 1
            assert score == pytest.approx(by_hand(module, causal.tokenizer(row.prompt).input_ids, ids), abs=1e-4)


def test_choices_of_one_token_need_one_pass(
    causal: Resident, plain: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After white space a letter is one byte, so one token."""
    module, row, model = plain(causal.module.config.model_type), Row("Yes or no?\n", "y"), fresh(causal)
    calls = []
    using = model.tuned.using
    monkeypatch.setattr(model.tuned, "using", lambda *args: calls.append(1) or using(*args))
    found = model.scores([row], ["y", "n"])
    assert len(calls) == 1
    prompt = causal.tokenizer(row.prompt).input_ids
    assert found[0].tolist() == pytest.approx([by_hand(module, prompt, [ord_]) for ord_ in
                                               (causal.tokenizer(c).input_ids[0] for c in "yn")], abs=1e-4)  # fmt: skip


def test_no_rows(causal: Resident, bert: Resident) -> None:
    model = fresh(causal)
    assert model.logprobs([]) == []
    assert model.generate([]) == []
    assert model.scores([], ["a", "b"]).shape == (0, 2)
    assert fresh(bert, None, 2).scores([], ["a", "b"]).shape == (0, 2)


def test_chat_rows_go_through_the_template(causal: Resident) -> None:
    turns = ({"role": "user", "content": "How are you?"},)
    chat, flat = Row("", "well", messages=turns), Row("user: How are you?\nassistant:", "well")
    model = fresh(causal)
    assert model.logprobs([chat]) == model.logprobs([flat])
    assert model.generate([chat]) == model.generate([flat])
    assert torch.equal(model.scores([chat], CHOICES), model.scores([flat], CHOICES))


def test_few_shot_examples_do_not_replace_the_turns_of_a_chat(causal: Resident) -> None:
    chat = Row("", "well", messages=({"role": "user", "content": "How are you?"},))
    assert Bare("Some examples. ").open({"base": causal}).logprobs([chat]) == fresh(causal).logprobs([chat])


@pytest.mark.parametrize("method", [None, Prefix(virtual_tokens=3)], ids=name)
def test_a_row_longer_than_the_context(causal: Resident, method: Averaging | None) -> None:
    model = opened(causal, method)
    room = 512 - (0 if method is None else 3)
    fits = Row("p" * (room - 3), "a", "fits")  # " a" and the end
    assert model.logprobs([fits])[0][1] == 3
    long = Row("p" * (room - 2), "a", "row-77")
    with pytest.raises(SiloError, match=r"a row has .* 512") as error:
        model.logprobs([ROWS[0], long])
    assert "\n" not in str(error.value)
    assert str(room + 1) in str(error.value)
    assert "row-77" not in str(error.value), "an id is the silo's own"


def test_an_encoder_cuts_long_texts(bert: Resident) -> None:
    model = opened(bert, Prefix(virtual_tokens=3), 2)
    long, cut = Row("p" * 900, "a"), Row("p" * 509, "a")
    assert torch.allclose(model.scores([long], ["a", "b"]), model.scores([cut], ["a", "b"]), atol=1e-5)


def labelled(resident: Resident, *pairs: tuple[str, str]) -> bool:
    return any(answering.with_end(resident, labels) for labels in pairs)


def test_labels_that_begin_another_are_told_with_their_end(causal: Resident) -> None:
    assert labelled(causal, ("good", "goodness"))
    assert labelled(causal, ("a b", "c", "a"))
    assert not labelled(causal, ("good", "bad"), ("goodness", "bad"), ("ab", "b"))
    assert not answering.with_end(causal, ())


def test_a_label_that_another_begins_can_win(causal: Resident) -> None:
    """Without its end, "good" would be at least as likely as "goodness" whatever was learnt."""
    method = Full(lr=1e-2, local_steps=60, batch_size=2)
    rows = tuple(Row(f"{i}:", "goodness", str(i)) for i in range(4))
    data = SiloData(rows, (), rows, ("good", "goodness"))
    engine = InProcess({"a": data}, {"base": causal})
    state = method.round(method.begin(engine.reach(0)), engine.reach(1))
    scores = method.serve(state).open({"base": causal}).scores(rows, data.labels)
    assert (scores.argmax(1) == 1).all()
    assert (scores[:, 1] > -1).all(), "what was trained is what is scored"


def test_text_begins_as_the_tokenizer_begins_it(llama: Resident) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inside = llama.tokenizer.backend_tokenizer.from_str(llama.tokenizer.backend_tokenizer.to_str())
    inside.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 7)])
    own = PreTrainedTokenizerFast(tokenizer_object=inside, bos_token="a", eos_token=llama.tokenizer.eos_token)
    own.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own.bos_token_id = 7
    (row,) = encode(replace(llama, tokenizer=own), [Row("ab", "c")], stop=False)
    (bare,) = encode(llama, [Row("ab", "c")], stop=False)
    assert (row.prompt, row.answer) == ([7, *bare.prompt], bare.answer)
    (chat,) = encode(replace(llama, tokenizer=own), [Row("", "c", messages=({"role": "user", "content": "ab"},))], stop=False)
    assert chat.prompt == bare.prompt, "a chat template writes its own beginning"


def test_scoring_tells_how_far_it_is(causal: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(answering, "PLACES", 8)
    progress.show(progress.Lines(said.append, gap=0))
    try:
        opened(causal, None).logprobs(ROWS)
    finally:
        progress.show(progress.Silent())
    assert [line.split(",")[0] for line in said] == [f"scoring: {n} of 5" for n in (1, 2, 3, 4)]


def test_a_chat_template_that_refuses_its_turns_is_told(llama: Resident) -> None:
    tokenizer = copy.copy(llama.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    row = Row("", "a", messages=({"role": "system", "content": "x"},))
    with pytest.raises(SiloError, match="the model's chat template does not take turns of system: no system role"):
        encode(replace(llama, tokenizer=tokenizer), [row], stop=True)
