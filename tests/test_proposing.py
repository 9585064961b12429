"""New candidates: how templates are taken apart and put together, and what of a model's text is an instruction."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.models import Resident
from fedtailor.prompts import Prompt
from fedtailor.proposing import (
    Parts,
    Write,
    by_model,
    cleaned,
    crossed,
    exemplified,
    listed,
    requests,
    taken_apart,
    write,
)

JUDGE = Prompt("Judge the text.\nBe fair.\n\nText: {input}\nMood:", words=("no", "yes"))
BARE = Prompt("Review: {prompt}")
POOL = (("a", "bad"), ("b", "bad"), ("c", "good"))


def test_a_template_is_an_instruction_and_a_layout() -> None:
    assert taken_apart(JUDGE) == Parts("Judge the text.\nBe fair.", "\n\n", "Text: ", "{input}", "\nMood:")
    assert taken_apart(BARE) == Parts("", "", "Review: ", "{prompt}", "")
    assert taken_apart(Prompt("Now\n{input}")) == Parts("Now", "\n", "", "{input}", "")


def test_another_instruction_goes_into_a_layout() -> None:
    assert taken_apart(JUDGE).with_instruction("Rate it.") == "Rate it.\n\nText: {input}\nMood:"
    assert taken_apart(BARE).with_instruction("Rate it.") == "Rate it.\n\nReview: {prompt}"
    assert taken_apart(JUDGE).with_instruction("") == "Text: {input}\nMood:"


def test_every_part_put_together_is_the_template() -> None:
    for prompt in (JUDGE, BARE, Prompt("Now\n{input}")):
        assert taken_apart(prompt).with_instruction(taken_apart(prompt).instruction) == prompt.template


def test_a_cross_takes_the_words_of_the_layout() -> None:
    found = {crossed([JUDGE, BARE], random.Random(i)) for i in range(30)}
    assert Prompt("Judge the text.\nBe fair.\n\nReview: {prompt}") in found
    assert Prompt("Text: {input}\nMood:", words=("no", "yes")) in found


def test_examples_are_of_the_public_pool_and_of_different_answers() -> None:
    for i in range(30):
        found = exemplified(JUDGE, POOL, 2, random.Random(i))
        assert replace(found, examples=()) == JUDGE
        assert 1 <= len(found.examples) <= 2
        assert set(found.examples) <= set(POOL)
        if len(found.examples) == 2:
            assert len({answer for _, answer in found.examples}) == 2


def test_requests_go_on_from_the_parents() -> None:
    found = requests([JUDGE, BARE], 4, random.Random(0))
    assert len(found) == 4
    assert all("Judge the text. Be fair." in text for text, _ in found)
    assert all(layout in (JUDGE, BARE) for _, layout in found)
    assert all("Read the text" in text for text, _ in requests([BARE], 2, random.Random(0)))


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (' "Judge it fairly."\n\nInstruction: more', "Judge it fairly."),
        ("Here it is:\nRate it.", "Rate it."),
        ("New instruction: Rate {input} now.", "Rate (input) now."),
        ("- **Rate it.**", "Rate it."),
        ("", ""),
        ("  \n \n", ""),
        ("!?", ""),
        ("ab", ""),
        ("123 456", ""),
        ("x" * 601, ""),
        ("half \ufffd character", ""),
        ("a bell \x07 rings", ""),
    ],
)
def test_rubbish_is_no_instruction(text: str, instruction: str) -> None:
    assert cleaned(text) == instruction


def test_a_list_is_read_line_by_line() -> None:
    assert listed("1. Rate it.\n2) Judge it.\n\n- Say it.\n• \n") == ["Rate it.", "Judge it.", "Say it."]


@pytest.mark.parametrize(
    "text",
    [
        "Here are 3 new instructions:\n1. Rate it.\n2. Judge it.",
        "<think>\nThey want two.\n- Like this?\n</think>\nRate it.\nJudge it.",
        "**New instructions:**\nRate it.\nJudge it.",
        "Sure, I can.\n\n- Rate it.\n- Judge it.\n\nTell me which works.",
        "Rate it.\nJudge it.\n<think>and so on",
    ],
)
def test_chatter_around_a_list_is_none_of_it(text: str) -> None:
    assert listed(text) == ["Rate it.", "Judge it."]
    assert listed("Rate the mood:") == ["Rate the mood:"]


def test_what_would_be_too_long_for_a_prompt_is_counted_and_not_made() -> None:
    one, other = Prompt("x" * 12_000 + "\n\n{input}"), Prompt("y\n\n" + "z" * 9_000 + "{input}")
    found = [crossed([one, other], random.Random(i)) for i in range(30)]
    assert None in found
    assert {one, other} <= set(found)


def test_the_base_writes_without_rows(llama: Resident, rated: dict[str, SiloData]) -> None:
    blank = SiloData((), (), ())
    body = Write(("Say:", "Tell:"), 0.8)
    texts = write(Silo("a", blank, {"base": llama}, 5), body)
    assert len(texts.texts) == 2
    assert texts == write(Silo("b", rated["zoo"], {"base": llama}, 5), body)
    assert texts.problem(body) is None
    assert replace(texts, texts=("one",)).problem(body) == "1 texts, asked 2"
    assert replace(texts, texts=("one", "x" * 20_001)).problem(body) == "a text of 20001 letters"


def test_a_silo_that_cannot_write_is_passed_over(llama: Resident, rated: dict[str, SiloData]) -> None:
    class Broken:  # a base that is not there, for one of the silos
        def __getitem__(self, name: str) -> Resident:
            from fedtailor.errors import SiloError

            raise SiloError("no base here")

    engine = InProcess(rated, {"base": llama})
    engine.desks["cafe"].models = Broken()
    ask = engine.reach(3)  # cafe's turn
    found, lost = by_model([JUDGE, BARE], 4, ask, 0.8, random.Random(0))
    assert len(found) + lost == 4
    assert [(silo, why) for _, silo, why in engine.rejected] == [("cafe", "no base here")]
    for name in ("shop", "zoo"):
        engine.desks[name].models = Broken()
    assert by_model([JUDGE, BARE], 4, ask, 0.8, random.Random(0)) == ([], 4)
