"""A prompt around a row: slots, words, examples, chats; what it holds and where it does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.data import Row
from fedtailor.models import Resident
from fedtailor.prompts import Prompt, Prompted, holds, made, shown, unfit
from fedtailor.rows import filled

LABELS = ("bad", "good")
ROW = Row("Note: late again\nUrgency:", "good", frame=(6, 9))


def test_a_row_knows_its_input() -> None:
    assert filled("Note: {note}\nUrgency:", {"note": "late again"}) == (ROW.prompt, ROW.frame)
    assert ROW.input == "late again"
    assert filled("{a} and {b}", {"a": "x", "b": "y"}) == ("x and y", (0, 0))
    assert Row("as it is", "").input == "as it is"


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        ("{prompt}", "Note: late again\nUrgency:"),
        ("{input}", "late again"),
        ("Read.\n\n{input}\nSo:", "Read.\n\nlate again\nSo:"),
        ("First.\n{prompt} ", "First.\nNote: late again\nUrgency: "),
        ("{curly} {input}", "{curly} late again"),
    ],
)
def test_the_slot_is_filled(template: str, asked: str) -> None:
    assert Prompt(template).told(ROW, LABELS).prompt == asked


def test_words_stand_for_labels_in_their_order() -> None:
    prompt = Prompt("{input} is", words=("no", "yes"))
    assert prompt.told(ROW, LABELS).answer == "yes"
    assert prompt.said(LABELS) == {"bad": "no", "good": "yes"}


def test_examples_come_in_front_in_the_same_form() -> None:
    prompt = Prompt("{input}:", words=("no", "yes"), examples=(("on time", "bad"), ("all lost", "good")))
    assert prompt.told(ROW, LABELS).prompt == "on time: no\n\nall lost: yes\n\nlate again:"
    whole = Prompt("{prompt}", examples=(("on time", "bad"),))
    assert whole.told(ROW, LABELS).prompt == "Note: on time\nUrgency: bad\n\nNote: late again\nUrgency:"


def test_a_chat_is_asked_in_its_last_turn() -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "late again"})
    told = Prompt("Judge: {input}", examples=(("on time", "good"),)).told(Row("", "good", messages=turns))
    assert told.messages == (
        turns[0],
        {"role": "user", "content": "Judge: on time"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "Judge: late again"},
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("Judge this.", "has no slot"),
        ("", "has no slot"),
        ("{input} {input}", "has 2 slots"),
        ("{input} {prompt}", "has 2 slots"),
        ("x" * 20_001 + "{input}", "letters"),
    ],
)
def test_a_template_without_one_slot_is_refused(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Prompt(template)


@pytest.mark.parametrize("words", [("no", "no"), ("no", " ")])
def test_words_must_tell_labels_apart(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="different words"):
        Prompt("{input}", words)


def test_what_is_served_crosses_the_wire() -> None:
    served = Prompted(Prompt("{input}:", ("no", "yes"), (("a", "bad"),)), LABELS)
    assert wire.unpack(wire.pack(served)) == served
    assert made("{input}") == Prompt("{input}")


def test_it_is_written_down_with_its_slot() -> None:
    prompt = Prompt("{prompt}", examples=(("on time", "bad"),))
    assert prompt.written("Note: {note}\nUrgency:") == "Note: on time\nUrgency: bad\n\nNote: {input}\nUrgency:"
    assert Prompt("Read: {input}").written("Note: {note}\nUrgency:") == "Read: {input}"
    assert Prompt("{prompt}").written("") == "{input}"


@given(st.text(min_size=1, max_size=30).filter(lambda s: not any(c in s for c in "{}")))
def test_any_text_goes_in_as_it_is(text: str) -> None:
    row = Row(text + AFTER, "good", frame=(0, len(AFTER)))
    assert Prompt("a {input} b").told(row, LABELS).prompt == f"a {text} b"


AFTER = "\nUrgency:"


@pytest.mark.parametrize(
    "hidden", ["Project Zinc", "project zinc", "PROJECT  ZINC", "Project\nZinc", "Ｐroject Zinc", "ProjectZinc"]
)
def test_a_secret_is_found_however_it_is_written(hidden: str) -> None:
    assert holds(Prompt(f"About {hidden}: {{input}}"), ["project zinc"])
    assert holds(Prompt("{input}", (hidden, "other")), ["project zinc"])
    assert holds(Prompt("{input}", examples=((hidden, "x"),)), ["project zinc"])
    assert not holds(Prompt("About zinc: {input}"), ["project zinc", "", " "])


def test_a_prompt_that_is_too_long_for_a_row_is_told(llama: Resident) -> None:
    assert llama.context == 512
    short, long = Row("tea", "good"), Row("tea " * 100, "good")
    prompt = Prompt("x" * 120 + "{input}")
    assert unfit(llama, prompt, [short], LABELS) is None
    assert "512" in str(unfit(llama, prompt, [short, long], LABELS))
    fits = 512 - 120 - len(" good") - 1  # one token a byte; the end
    assert unfit(llama, prompt, [Row("y" * fits, "good")], LABELS) is None
    assert unfit(llama, prompt, [Row("y" * (fits + 1), "good")], LABELS)
    shots = Prompt("{input}", examples=(("z" * 200, "good"), ("z" * 200, "bad")))
    assert unfit(llama, shots, [Row("y" * 80, "good")], LABELS) is None
    assert unfit(llama, shots, [Row("y" * 120, "good")], LABELS)


def test_a_long_template_is_shown_by_its_beginning() -> None:
    assert shown("{input}\n") == r"'{input}\n'"
    assert len(shown("y" * 100)) == 60


@pytest.mark.parametrize("hidden", ["Pro-ject Zi\u00adnc", "pro\u200bject zinc", "PROJECT_ZINC", "p.r.o.j.e.c.t zinc"])
def test_neither_hyphens_nor_letters_without_a_width_hide_a_secret(hidden: str) -> None:
    assert holds(Prompt(f"For {hidden}: {{input}}"), ["project zinc"])
    assert not holds(Prompt("For {input}"), ["project zinc"])
    assert holds(Prompt("For +++ {input}"), ["+++"]), "without letters it is looked for as it stands"
    assert not holds(Prompt("For {input}"), ["+++", " "])


def test_a_prompt_is_shown_with_its_examples() -> None:
    assert shown(Prompt("{input}", examples=(("a", "b"),))) == "'{input}' with 1 example"
    assert shown(Prompt("{input}", examples=(("a", "b"), ("c", "d")))) == "'{input}' with 2 examples"
    assert shown(Prompt("{input}")) == shown("{input}") == "'{input}'"
