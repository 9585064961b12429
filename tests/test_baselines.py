"""Views of the data: pooled, alone, with examples in front of every prompt; and the samples that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.answering import fresh
from fedtailor.baselines import POOLED, Bare, alone, few_shot, pooled, samples, zero_shot
from fedtailor.data import Row, SiloData
from fedtailor.models import Resident

Silos = Mapping[str, SiloData]


def shown(before: str, data: Silos) -> list[tuple[str, Row]]:
    """The training rows in a few-shot text, in its order, with their silo."""
    found = [
        (before.find(f"{row.prompt} {row.answer}\n\n"), name, row) for name, d in data.items() for row in d.train
    ]
    return [(name, row) for place, name, row in sorted(found, key=lambda f: f[0]) if place >= 0]


def test_zero_shot_is_the_base(any_resident: Resident, rated: Silos) -> None:
    served = zero_shot(rated)
    assert served == Bare("", 2)
    rows, labels = rated["zoo"].test, rated["zoo"].labels
    expected = fresh(any_resident, None, 2 if any_resident.classifier else 0).scores(rows, labels)
    assert wire.unpack(wire.pack(served)).open({"base": any_resident}).scores(rows, labels).equal(expected)


def test_few_shot_shows_training_rows_of_different_silos_and_labels(rated: Silos) -> None:
    for seed in range(8):
        served = few_shot(rated, 3, seed)
        chosen = shown(served.before, rated)
        assert served.before.count("\n\n") == 3 == len(chosen)
        assert {name for name, _ in chosen} == set(rated)
        assert {row.answer for _, row in chosen} == {"bad", "good"}
        assert served.before == "".join(f"{row.prompt} {row.answer}\n\n" for _, row in chosen)
        assert not any(row.prompt in served.before for d in rated.values() for row in (*d.val, *d.test))


def test_few_shot_is_seeded(rated: Silos) -> None:
    assert few_shot(rated, 3, 1) == few_shot(rated, 3, 1)
    assert len({few_shot(rated, 3, seed).before for seed in range(9)}) > 3


@given(count=st.integers(1, 9), seed=st.integers(0, 50))
def test_no_example_is_shown_twice(count: int, seed: int) -> None:
    rows = tuple(Row(f"row {i}:", ("no", "yes")[i % 2]) for i in range(6))
    data = {"a": SiloData(rows[:3], (), (), ("no", "yes")), "b": SiloData(rows[3:], (), (), ("no", "yes"))}
    shots = few_shot(data, count, seed).before.split("\n\n")[:-1]
    assert len(set(shots)) == len(shots) <= count
    assert len(shots) >= min(count, 4)


def test_few_shot_of_texts_and_of_one_silo(written: Silos) -> None:
    before = few_shot({"zoo": written["zoo"]}, 3, 0).before
    assert len(shown(before, written)) == 3
    assert {name for name, _ in shown(before, written)} == {"zoo"}


def test_an_example_joins_as_the_model_reads_it() -> None:
    data = {"a": SiloData((Row("Line.\n", "yes"),), (), ())}
    assert few_shot(data, 1, 0).before == "Line.\nyes\n\n"
    assert few_shot({"a": SiloData((Row("Line.", "yes"),), (), ())}, 1, 0).before == "Line. yes\n\n"


def test_chat_examples_are_turns_before_the_question() -> None:
    ask, system = {"role": "user", "content": "How?"}, {"role": "system", "content": "Be kind."}
    served = few_shot({"a": SiloData((Row("", "well", messages=(system, ask)),), (), ())}, 3, 0)
    assert served.before == ""
    assert served.turns == (ask, {"role": "assistant", "content": "well"}), "one example, without its system turn"
    other = {"role": "user", "content": "Who?"}
    assert served.told(Row("", "me", messages=(other,))).messages == (*served.turns, other)


def test_pooled_is_all_rows_of_all_silos(rated: Silos) -> None:
    ((name, one),) = pooled(rated).items()
    assert name == POOLED
    assert one.labels == ("bad", "good")
    for part in ("train", "val", "test"):
        assert getattr(one, part) == tuple(row for d in rated.values() for row in getattr(d, part))


def test_alone_is_one_silo(rated: Silos) -> None:
    assert alone(rated, "shop") == {"shop": rated["shop"]}


def test_samples_take_the_silos_in_turn(causal: Resident, rated: Silos, written: Silos) -> None:
    found = samples(fresh(causal), rated, 4, 5)
    assert [s["silo"] for s in found] == ["cafe", "shop", "zoo", "cafe"]
    rows = [rated[name].test[i] for name, i in (("cafe", 0), ("shop", 0), ("zoo", 0), ("cafe", 1))]
    assert [(s["prompt"], s["answer"]) for s in found] == [(row.prompt, row.answer) for row in rows]
    best = fresh(causal).scores(rows, ("bad", "good")).argmax(1).tolist()
    assert [s["generated"] for s in found] == [("bad", "good")[i] for i in best]
    texts = samples(fresh(causal), written, 100, 5)
    assert len(texts) == 6
    assert [s["generated"] for s in texts] == fresh(causal).generate(
        [written[s["silo"]].test[i // 3] for i, s in enumerate(texts)], max_new_tokens=5
    )


def test_samples_of_nothing(llama: Resident, rated: Silos) -> None:
    assert samples(fresh(llama), rated, 0, 5) == []
    empty = {"a": SiloData(rated["zoo"].train, (), (), rated["zoo"].labels)}
    assert samples(fresh(llama), empty, 4, 5) == []


def test_a_sample_of_a_chat_shows_its_last_turn(llama: Resident) -> None:
    chat = Row("", "well", messages=({"role": "user", "content": "First?"}, {"role": "user", "content": "Last?"}))
    (one,) = samples(fresh(llama), {"a": SiloData((chat,), (), (chat,))}, 4, 3)
    assert one["prompt"] == "Last?"


@pytest.mark.parametrize("labels", [2, 3])
def test_a_bare_encoder_finds_all_labels_alike(bert: Resident, labels: int) -> None:
    scores = Bare(labels=labels).open({"base": bert}).scores([Row("abc", "x")], ["x", "y", "z"][:labels])
    assert scores.exp().tolist()[0] == pytest.approx([1 / labels] * labels)


def test_a_few_shot_answer_ends_where_the_next_example_would_begin(llama: Resident, written: Silos) -> None:
    """The rest of what the model says is no part of its answer."""
    served = few_shot(written, 3, 0)
    rows = list(written["zoo"].test) or list(written["zoo"].train)
    model = served.open({"base": llama})
    assert model.until == "\n\n"
    whole = replace(model, until="").generate(rows, max_new_tokens=24)
    letter = next(text[3] for text in whole if len(text) > 4 and text[3].strip())
    cut = replace(model, until=letter).generate(rows, max_new_tokens=24)
    assert cut == [text.split(letter)[0].strip() for text in whole]
    assert cut != whole


def test_the_system_turn_of_a_chat_stays_in_front() -> None:
    said = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    assert Bare(turns=said).told(Row("", "", messages=(system, user))).messages == (system, *said, user)
    assert Bare(turns=said).told(Row("", "", messages=(user,))).messages == (*said, user)
