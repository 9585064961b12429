"""Sources, settings and rows that are refused; every message that a user may meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtailor.data import Data, load
from test_data import chat, problem, settings_for, split_rows, write


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.jsonl", None, "no such file; looked for"),
        ("rows.txt", b"x", "unknown format '.txt' (choices: .csv, .jsonl, .parquet"),
        ("r.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "r.jsonl line 2: byte 0xe9 at offset 30 is not UTF-8"),
        ("r.jsonl", b'{"text": 1}\n\n{"text": \n', "r.jsonl line 3: not valid JSON"),
        ("r.jsonl", b"[1]\n", "r.jsonl line 1: a list where a JSON object is needed"),
        ("r.jsonl", b"\n", "has no rows"),
        ("r.csv", b"text,mood,silo\na,b\n", "r.csv line 2: fewer fields than the 3 of the header"),
        ("r.csv", b"text,mood,silo\na,b,c,d\n", "r.csv line 2: more fields than the 3"),
        ("r.csv", b'text,mood,silo\n"a"b,c,d\n', "r.csv line 2: not valid CSV"),
        ("r.parquet", b"not parquet", "r.parquet: not a readable parquet file"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert says in problem(settings_for(str(tmp_path / name)))


def test_unknown_sources(tmp_path: Path) -> None:
    assert "did you mean 'sentiment'?" in problem(settings_for("sentimet"))
    (tmp_path / "folder").mkdir()
    assert "not a folder written by datasets.save_to_disk" in problem(settings_for(str(tmp_path / "folder")))


def test_a_hub_set_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "'who/what': no such file here, and not loaded from the hub (no route)" in problem(settings_for("who/what"))


GOOD = split_rows()


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        ({"label": "mod"}, {}, "[data] label: r.jsonl has no column 'mod'; did you mean 'mood'? (choices: mood, silo,"),
        ({"template": "{txt}"}, {}, "[data] template: r.jsonl has no column 'txt'; did you mean 'text'?"),
        ({"silo_column": "owner"}, {}, "[data] silo_column: r.jsonl has no column 'owner'"),
        ({"split_column": "part"}, {}, "[data] split_column: r.jsonl has no column 'part'"),
        ({"split_column": "mood"}, {}, "line 1: column 'mood' says 'good', which is no split"),
        ({"labels": ("good", "poor")}, {}, "line 2 (silo 'a'): label 'bad' is not in labels (choices: good, poor)"),
        ({"label": "silo", "silo_column": "mood", "max_words": 1}, {}, "all 6 rows have more than 1 words"),
        ({}, {"c": {}}, "[silo.c]: the data has no silo of this name (choices: a, b)"),
        ({}, {"a": {"max_words": 2}}, "silo 'a': all 6 rows have more than 2 words; raise max_words"),
        ({}, {"a": {"source": "x"}}, "[silo.a] source: holds for all silos"),
        ({}, {"a": {"template": "none"}}, "[silo.a]: template 'none' has no field"),
        ({}, {"a": {"max_train": "lots"}}, "[silo.a] max_train: Input should be a valid integer"),
        ({}, {"a": {"template": "{txt}"}}, "[silo.a] template: r.jsonl has no column 'txt'"),
        ({"silo_column": "", "partition": "iid", "silos": 99}, {}, "99 silos need a training row each, and there are"),
    ],
)
def test_settings_that_do_not_fit_the_rows(
    tmp_path: Path, changes: dict[str, Any], overrides: dict[str, Any], says: str
) -> None:
    assert says in problem(settings_for(write(tmp_path / "r.jsonl", GOOD), **changes), overrides)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"mood": ""}, "line 13: the label (column 'mood') is empty"),
        ({"mood": None}, "line 13: nothing in column 'mood'"),
        ({"text": None}, "line 13: nothing in column 'text'"),
        ({"silo": " "}, "line 13: the silo's name (column 'silo') is empty"),
        ({"split": "tset"}, "line 13: column 'split' says 'tset', which is no split; did you mean 'test'?"),
        ({"silo": "c", "split": "test"}, "silo 'c': none of its 1 rows is for training (0 val, 1 test)"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    last = {"text": "x", "mood": "good", "silo": "a", "split": "train", **row}
    assert says in problem(settings_for(write(tmp_path / "r.jsonl", [*GOOD, last])))


def test_an_empty_answer_is_named(tmp_path: Path) -> None:
    rows = [{**row, "reply": "" if n == 3 else "ok"} for n, row in enumerate(GOOD)]
    assert "line 4: the answer (column 'reply') is empty" in problem(
        settings_for(write(tmp_path / "r.jsonl", rows), label="", answer="reply")
    )


def test_one_label_is_none(tmp_path: Path) -> None:
    rows = [{**row, "mood": "good"} for row in GOOD]
    assert "has no label but 'good'" in problem(settings_for(write(tmp_path / "r.jsonl", rows)))


def test_nobody_has_a_test_row(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "split"} for row in GOOD[:4]]
    source = write(tmp_path / "r.jsonl", rows)
    assert "no silo has a row in val" in problem(settings_for(source, val_fraction=0.0001, test_fraction=0))
    assert load(settings_for(source, val_fraction=0, test_fraction=0), {}, 0).silos["a"].test == ()


@pytest.mark.parametrize(
    ("talk", "says"),
    [
        ([], "must be a list of two or more"),
        ("{", "is not valid JSON"),
        (chat("Hi"), "must be a list of two or more"),
        (chat("Hi", "Hello", "Bye"), "the last turn is the user's"),
        (chat("Hi", " "), "the assistant's answer is empty"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "turn 1: needs a text under each of role and content"),
        ([{"role": "usr", "content": "x"}] * 2, "turn 1: role 'usr' is unknown; did you mean 'user'?"),
    ],
)
def test_malformed_messages(tmp_path: Path, talk: Any, says: str) -> None:
    rows = [{"talk": talk, "silo": "a"}]
    message = problem(Data(source=write(tmp_path / "r.jsonl", rows), messages="talk", silo_column="silo"))
    assert message.startswith("r.jsonl line 1: column 'talk'")
    assert says in message


@pytest.mark.parametrize(("header", "said"), [("text,mood,text", "two columns 'text'"), ("text,,silo", "an empty column name")])
def test_a_csv_header_that_does_not_name_its_columns(tmp_path: Path, header: str, said: str) -> None:
    (tmp_path / "rows.csv").write_text(f"{header}\na,b,c\n")
    assert problem(settings_for(str(tmp_path / "rows.csv"))) == f"rows.csv line 1: {said}; name each once"


@pytest.mark.parametrize(("line", "said"), [
    ('{"text": "cut \\ud83d", "mood": "good", "silo": "a"}', "rows.jsonl line 2: half a surrogate pair"),
    ("[" * 100_000, "rows.jsonl line 2: not valid JSON"),
])  # fmt: skip
def test_json_that_is_no_text(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine \\ud83d\\ude00", "mood": "good", "silo": "a"}\n' + line + "\n")
    assert said in problem(settings_for(str(tmp_path / "rows.jsonl")))
