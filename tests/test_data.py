"""Sources to rows, on files of a few lines."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedtailor.data import Data, Loaded, Row, load
from fedtailor.errors import UserError
from fedtailor.retrieval.policy import Policy

Rows = Sequence[Mapping[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def split_rows(silos: Sequence[str] = ("a", "b"), each: int = 4) -> list[dict[str, Any]]:
    """Per silo `each` training rows, one of valid, one of test; labels alternate."""
    return [
        {"text": f"{silo} says {n}", "mood": ("good", "bad")[n % 2], "silo": silo,
         "split": {each: "valid", each + 1: "test"}.get(n, "train")}
        for silo in silos for n in range(each + 2)
    ]


def settings_for(source: str, **more: Any) -> Data:
    given = {"template": "{text}\nMood:", "label": "mood", "silo_column": "silo", **more}
    return Data(source=source, **given)


def problem(data: Data, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(data, overrides or {}, 0)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_rows_in_order_with_split_and_label_words(tmp_path: Path) -> None:
    loaded = load(settings_for(write(tmp_path / "rows.jsonl", split_rows())), {}, 0)
    a = loaded.silos["a"]
    assert list(loaded.silos) == ["a", "b"]
    assert [row.prompt for row in a.train] == [f"a says {n}\nMood:" for n in range(4)]
    assert [row.answer for row in a.train] == ["good", "bad", "good", "bad"]
    assert [row.prompt for row in a.val + a.test] == ["a says 4\nMood:", "a says 5\nMood:"]
    assert a.labels == ("bad", "good")
    assert loaded.dropped == {"a": 0, "b": 0}
    assert [len(row.id) for row in a.train] == [12] * 4
    assert len({row.id for row in a.train}) == 4


def test_generation_keeps_ids_and_trims_answers(tmp_path: Path) -> None:
    rows = [{**row, "reply": "  yes \n", "id": n} for n, row in enumerate(split_rows())]
    silo = load(settings_for(write(tmp_path / "r.jsonl", rows), label="", answer="reply"), {}, 0).silos["b"]
    assert silo.labels == ()
    assert silo.train[0] == Row(prompt="b says 0\nMood:", answer="yes", id="6")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_other_formats_say_the_same(tmp_path: Path, kind: str) -> None:
    rows = split_rows()
    expected = load(settings_for(write(tmp_path / "r.jsonl", rows)), {}, 0)
    if kind == "csv":
        lines = ["text,mood,silo,split", *(f'"{r["text"]}",{r["mood"]},{r["silo"]},{r["split"]}' for r in rows)]
        (tmp_path / "r.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        source = tmp_path / "r.csv"
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        source = tmp_path / "r.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        import datasets

        source = tmp_path / "saved"
        apart = {s: datasets.Dataset.from_list([{k: v for k, v in r.items() if k != "split"} for r in rows if r["split"] == s])
                 for s in ("train", "valid", "test")}
        datasets.DatasetDict(apart).save_to_disk(str(source))
    assert load(settings_for(str(source)), {}, 0).sha256 == expected.sha256


def test_class_numbers_of_a_saved_folder_become_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "silo": datasets.Value("string"), "mood": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"text": f"t{n}", "silo": "a", "mood": n % 2} for n in range(40)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    silo = load(settings_for(str(tmp_path / "d")), {}, 0).silos["a"]
    assert silo.labels == ("no", "yes")
    assert {(int(row.prompt[1:].split("\n")[0]) % 2, row.answer) for row in silo.train} == {(0, "no"), (1, "yes")}


def test_a_number_stands_for_the_word_at_its_place_in_labels(tmp_path: Path) -> None:
    rows = [{**row, "mood": 0 if row["mood"] == "bad" else 1} for row in split_rows()]
    silo = load(settings_for(write(tmp_path / "r.jsonl", rows), labels=("bad", "good")), {}, 0).silos["a"]
    assert [row.answer for row in silo.train] == ["good", "bad", "good", "bad"]


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def test_chat_rows(tmp_path: Path) -> None:
    rows = [{"talk": chat("Hi", "Hello", f"How {n}?", "Fine "), "silo": "a", "split": s}
            for n, s in enumerate(["train", "valid", "test"])]
    rows.append({"talk": json.dumps(chat("As text?", "Yes")), "silo": "a", "split": "train"})
    data = Data(source=write(tmp_path / "r.jsonl", rows), messages="talk", silo_column="silo")
    first, second = load(data, {}, 0).silos["a"].train
    assert (first.prompt, first.answer) == ("", "Fine")
    assert [turn["content"] for turn in first.messages] == ["Hi", "Hello", "How 0?"]
    assert (second.messages, second.answer) == (({"role": "user", "content": "As text?"},), "Yes")


def test_template_braces_and_odd_column_names(tmp_path: Path) -> None:
    rows = [{**row, "a.b": "x"} for row in split_rows()]
    silo = load(settings_for(write(tmp_path / "r.jsonl", rows), template="{{{a.b}}} {text}"), {}, 0).silos["a"]
    assert silo.train[0].prompt == "{x} a says 0"


def many(silos: int, each: int) -> list[dict[str, Any]]:
    return [{"text": f"row {n}", "mood": "abc"[n % 3], "silo": f"s{n % silos:04d}"} for n in range(silos * each)]


def where(loaded: Loaded) -> dict[str, tuple[str, str]]:
    return {row.prompt: (name, part) for name, silo in loaded.silos.items() for part in ("train", "val", "test")
            for row in getattr(silo, part)}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shuffle=st.randoms(use_true_random=False), seed=st.integers(0, 9))
def test_splits_do_not_depend_on_order_or_seed(tmp_path: Path, shuffle: random.Random, seed: int) -> None:
    rows = many(3, 40)
    before = where(load(settings_for(write(tmp_path / "r.jsonl", rows)), {}, 0))
    shuffle.shuffle(rows)
    assert where(load(settings_for(write(tmp_path / "r.jsonl", rows)), {}, seed)) == before


def test_splits_do_not_depend_on_other_rows_or_the_partition(tmp_path: Path) -> None:
    whole = where(load(settings_for(write(tmp_path / "r.jsonl", many(3, 60))), {}, 0))
    half = where(load(settings_for(write(tmp_path / "h.jsonl", many(3, 60)[:90])), {}, 0))
    assert half.items() <= whole.items()
    for kind in ("iid", "dirichlet"):
        data = settings_for(str(tmp_path / "r.jsonl"), silo_column="", partition=kind, silos=5)
        dealt = where(load(data, {}, 3))
        assert {prompt: part for prompt, (_, part) in dealt.items()} == {p: part for p, (_, part) in whole.items()}
    counts = [sum(part == name for _, part in whole.values()) for name in ("train", "val", "test")]
    assert sum(counts) == 180
    assert 126 <= counts[0] <= 162


def test_equal_prompts_fall_on_one_side(tmp_path: Path) -> None:
    rows = [{**row, "text": row["text"].split()[1][:1], "extra": n} for n, row in enumerate(many(2, 50))]
    loaded = load(settings_for(write(tmp_path / "r.jsonl", rows)), {}, 0)
    for silo in loaded.silos.values():
        parts = [{row.prompt for row in part} for part in (silo.train, silo.val, silo.test)]
        assert len(set.union(*parts)) == sum(map(len, parts))


def test_a_split_the_column_never_names_is_cut_from_train(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if n % 4 == 0 else "train"} for n, row in enumerate(many(2, 60))]
    silos = load(settings_for(write(tmp_path / "r.jsonl", rows)), {}, 0).silos.values()
    assert sum(len(silo.test) for silo in silos) == 30
    assert 3 <= sum(len(silo.val) for silo in silos) <= 18


def test_a_thousand_silos_of_twenty_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", many(1000, 20))
    by_column = load(settings_for(source), {}, 0)
    dealt = load(settings_for(source, silo_column="", partition="dirichlet", silos=1000), {}, 0)
    for loaded in (by_column, dealt):
        assert len(loaded.silos) == 1000
        assert len(where(loaded)) == 20_000
        assert all(silo.train for silo in loaded.silos.values())
    assert list(dealt.silos)[:2] == ["silo_000", "silo_001"]


def test_the_filter_drops_and_counts(tmp_path: Path) -> None:
    rows = split_rows() + [{"text": "far too long a text", "mood": "bad", "silo": "b", "split": "train"}] * 2
    loaded = load(settings_for(write(tmp_path / "r.jsonl", rows), max_words=4), {}, 0)
    assert loaded.dropped == {"a": 0, "b": 2}
    assert len(loaded.silos["b"].train) == 4


def test_the_choice_is_fixed_ordered_and_nested(tmp_path: Path) -> None:
    rows = split_rows(each=30)
    data = settings_for(write(tmp_path / "r.jsonl", rows), max_train=10)
    ten = load(data, {}, 0).silos["a"].train
    assert len(ten) == 10
    numbers = [int(row.prompt.split()[2]) for row in ten]
    assert numbers == sorted(numbers)
    few = load(settings_for(data.source, max_train=4), {}, 0).silos["a"].train
    assert {row.prompt for row in few} <= {row.prompt for row in ten}
    assert load(data, {}, 1).silos["a"].train != ten
    random.Random(0).shuffle(rows)
    write(tmp_path / "r.jsonl", rows)
    assert {row.prompt for row in load(data, {}, 0).silos["a"].train} == {row.prompt for row in ten}


def test_a_silo_has_its_own_settings(tmp_path: Path) -> None:
    data = settings_for(write(tmp_path / "r.jsonl", split_rows()))
    own = {"b": {"template": "[{text}]", "max_train": 2, "rate": 0.5}}
    loaded = load(data, own, 0)
    b = loaded.silos["b"]
    assert len(b.train) == 2
    assert b.train[0].prompt.startswith("[b says")
    assert b.settings == {"rate": 0.5}
    assert loaded.silos["a"].settings == {}
    assert loaded.silos["a"] == load(data, {}, 0).silos["a"]


def test_the_hash_is_of_the_rows(tmp_path: Path) -> None:
    data = settings_for(write(tmp_path / "r.jsonl", split_rows()))
    assert load(data, {}, 0).sha256 == load(data, {"a": {"rate": 1}}, 5).sha256
    assert load(data, {}, 0).sha256 != load(data, {"a": {"max_train": 3}}, 0).sha256


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label": ""}, "exactly one of answer, label and messages, not none"),
        ({"answer": "x"}, "exactly one of answer, label and messages, not answer and label"),
        ({"template": ""}, "template is missing"),
        ({"template": "no field"}, "has no field"),
        ({"template": "{text"}, "expected '}'"),
        ({"template": "{text!r}"}, "a name and nothing else"),
        ({"label": "", "messages": "m"}, "template does not go with messages"),
        ({"label": "", "answer": "x", "labels": ("a", "b")}, "labels are for classification"),
        ({"labels": ("a", "a")}, "two or more different words"),
        ({"silo_column": ""}, "set silo_column, or partition"),
        ({"silos": 3}, "silos goes with a partition"),
        ({"partition": "iid", "silos": 3}, "both say whose"),
        ({"partition": "iid", "silo_column": ""}, "needs silos"),
        ({"partition": "label", "silo_column": "", "silos": 2, "label": "", "answer": "x"}, "deals by label"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "below 1"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("{", r"\{").replace("[", r"\[")) as error:
        settings_for("s.jsonl", **changes)
    assert "\n" not in str(error.value)


def test_the_fields_are_the_schema() -> None:
    schema = TypeAdapter(Data)
    read = schema.validate_python(
        {"source": "s", "template": "{t}", "label": "l", "labels": ["a", "b"], "partition": "iid", "silos": 3}
    )
    assert read.labels == ("a", "b")
    for wrong in ({"silos": 0}, {"partition": "other"}, {"alpha": 0}, {"max_words": -1}, {"val_fraction": 1}):
        with pytest.raises(ValidationError):
            schema.validate_python({"source": "s", "template": "{t}", "label": "l", "partition": "iid", "silos": 3, **wrong})


def test_a_silo_may_learn_something_else(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", split_rows())
    found = load(settings_for(source), {"a": {"answer": "text"}}, 0).silos
    assert (found["a"].labels, found["b"].labels) == ((), ("bad", "good"))
    assert [row.answer for row in found["a"].train] == [f"a says {n}" for n in range(4)]


def test_csv_labels_may_be_numbers(tmp_path: Path) -> None:
    lines = [f"text {i},{i % 2},{'ab'[i % 2 == 0]}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,mood,silo", *lines]))
    silos = load(settings_for(str(tmp_path / "rows.csv"), labels=("bad", "good")), {}, 0).silos
    assert {row.answer for row in silos["a"].train} == {"good"}
    assert {row.answer for row in silos["b"].train} == {"bad"}


def test_all_rows_may_be_one_owners(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", split_rows())
    found = load(settings_for(source, silo_column="nowhere"), {}, 0, owner="mine").silos
    assert list(found) == ["mine"]
    assert len(found["mine"].train) == 8


def test_public_rows_are_held_out_of_every_silo(tmp_path: Path) -> None:
    """By content, without their answers; what is for validation and test stays what it is without them."""
    rows = [{"text": f"{silo} says {n}", "mood": ("good", "bad")[n % 2], "silo": silo} for silo in "ab" for n in range(60)]
    source = write(tmp_path / "rows.jsonl", rows)
    without, held = (load(settings_for(source, public_fraction=f), {}, 0) for f in (0.0, 0.25))
    assert without.public == ()
    assert 15 < len(held.public) < 45
    assert {row.answer for row in held.public} == {""}
    taken = {row.prompt for row in held.public}
    for name, silo in held.silos.items():
        before = without.silos[name]
        assert (silo.val, silo.test) == (before.val, before.test)
        assert silo.train == tuple(row for row in before.train if row.prompt not in taken)
    assert taken <= {row.prompt for silo in without.silos.values() for row in silo.train}
    few = load(settings_for(source, public_fraction=0.25, max_public=5), {}, 0)
    assert len(few.public) == 5
    assert set(few.public) <= set(held.public)
    assert few.silos == held.silos
    assert len({without.sha256, held.sha256, few.sha256}) == 3


def test_public_rows_of_a_file_of_their_own(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", split_rows())
    labelled = write(tmp_path / "labelled.jsonl", [{"text": "all say", "mood": "bad"}])
    bare = write(tmp_path / "bare.jsonl", [{"text": "all say"}, {"text": "none say"}])
    (row,) = load(settings_for(source, public=labelled), {}, 0).public
    assert (row.prompt, row.answer, row.input) == ("all say\nMood:", "bad", "all say")
    loaded = load(settings_for(source, public=bare), {}, 0)
    assert [(row.prompt, row.answer) for row in loaded.public] == [("all say\nMood:", ""), ("none say\nMood:", "")]
    assert loaded.silos == load(settings_for(source), {}, 0).silos
    partly = write(tmp_path / "partly.jsonl", [{"text": "all say", "mood": "bad"}, {"text": "some say", "mood": ""}])
    assert [row.answer for row in load(settings_for(source, public=partly), {}, 0).public] == ["bad", ""]
    wordy = write(tmp_path / "wordy.jsonl", [{"text": "all of them say so today"}, {"text": "none say"}])
    assert len(load(settings_for(source, public=wordy, max_words=5), {}, 0).public) == 1
    assert "[data] public 'nowhere.jsonl'" in problem(settings_for(source, public="nowhere.jsonl"))
    lacking = write(tmp_path / "lacking.jsonl", [{"txt": "all say"}])
    assert "[data] public template: lacking.jsonl has no column 'text'" in problem(settings_for(source, public=lacking))


def test_of_the_silos_that_a_column_names_only_some(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", split_rows("abc"))
    every, some = load(settings_for(source), {}, 0), load(settings_for(source, only=("c", "a")), {"b": {"max_train": 1}}, 0)
    assert some.silos == {name: every.silos[name] for name in "ac"}
    assert list(some.silos) == ["a", "c"]
    assert some.sha256 != every.sha256
    assert problem(settings_for(source, only=("a", "d"))) == "[data] only: the data has no silo 'd' (choices: a, b, c)"
    apart = write(tmp_path / "apart.jsonl", [{**row, "mood": f"{row['mood']} {row['silo']}"} for row in split_rows("ab")])
    assert load(settings_for(apart, only=("a",)), {}, 0).silos["a"].labels == ("bad a", "good a"), "no words of who is left out"


PASSAGES = [{"silo": silo, "document": f"{silo}.md", "text": f"{silo} tells {n}"} for silo in "abc" for n in range(2)]


def test_a_table_of_passages_gives_each_silo_its_documents_and_policy(tmp_path: Path) -> None:
    source, corpus = write(tmp_path / "rows.jsonl", split_rows("ab")), write(tmp_path / "passages.jsonl", PASSAGES)
    data = settings_for(source, corpus=corpus, documents=Policy(words=9))
    loaded = load(data, {"b": {"documents": {"share": "snippets", "words": 5}, "rank": 2}}, 0)
    found = {name: silo.corpus for name, silo in loaded.silos.items()}
    assert {name: [one.name for one in each.documents] for name, each in found.items() if each} == {"a": ["a.md"], "b": ["b.md"]}
    assert [each.policy for each in found.values() if each] == [Policy(words=9), Policy(share="snippets", words=5)]
    assert loaded.silos["b"].settings == {"rank": 2}
    without = load(settings_for(source), {}, 0)
    assert {silo.corpus for silo in without.silos.values()} == {None}
    assert [silo.train for silo in without.silos.values()] == [silo.train for silo in loaded.silos.values()]
    other = write(tmp_path / "other.jsonl", [*PASSAGES[1:], {**PASSAGES[0], "text": "a tells more"}])
    more = write(tmp_path / "more.jsonl", [*PASSAGES, {**PASSAGES[-1], "document": "d.md"}])  # of a silo that is not asked
    sha = [load(settings_for(source, corpus=one), {}, 0).sha256 for one in (corpus, other, more)]
    assert len({without.sha256, *sha}) == 3
    assert sha[0] == sha[2] == loaded.sha256, "a policy is no document"


def test_documents_that_cannot_be(tmp_path: Path) -> None:
    source, corpus = write(tmp_path / "rows.jsonl", split_rows("ad")), write(tmp_path / "passages.jsonl", PASSAGES)
    assert problem(settings_for(source, corpus=corpus)).startswith("[data] corpus: passages.jsonl has no passage of silo 'd'")
    assert load(settings_for(source, corpus=corpus, only=("a",)), {}, 0).silos["a"].corpus is not None
    told = problem(settings_for(source, corpus=corpus, only=("a",)), {"a": {"documents": {"share": "all"}}})
    assert told.startswith("[silo.a] documents share: Input should be 'full', 'shareable', 'redacted', 'snippets' or 'answers'")
    told = problem(settings_for(source, corpus=corpus), {"a": {"corpus": corpus}})
    assert told.startswith("[silo.a] corpus: holds for all silos, so set it in [data]")
    assert "d.index: no index there" in problem(settings_for(source, corpus=f"{tmp_path}/{{silo}}.index", only=("d",)))
    dealt = settings_for(source, silo_column="", partition="iid", silos=2, corpus=corpus)
    assert problem(dealt) == (
        "[data] corpus: whose each passage of passages.jsonl is says silo_column; set it, in place of a partition"
    )


def test_public_rows_are_named_or_held_out(tmp_path: Path) -> None:
    for more, says in (
        ({"public": "a.jsonl", "public_fraction": 0.1}, "remove one of them"),
        ({"val_fraction": 0.4, "test_fraction": 0.3, "public_fraction": 0.3}, "public_fraction 0.3 leave no row to train on"),
    ):
        with pytest.raises(ValueError, match=says):
            settings_for("rows.jsonl", **more)
