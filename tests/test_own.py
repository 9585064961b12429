"""A study of a user's own rows: what its columns are taken for, and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtailor.errors import UserError
from fedtailor.study import grid, own

MOODS = ("good", "bad")
BARE = [{"site": f"s{i % 2}", "note": f"n {i}"} for i in range(20)]


def rows(count: int = 40, silos: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [
        {"site": f"s{i % silos}", "note": f"The visit number {i} went as it was planned.", "mood": MOODS[i % 2], "id": i,
         **{key: value[i % len(value)] for key, value in more.items()}}
        for i in range(count)
    ]  # fmt: skip


def written(tmp_path: Path, table: list[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def test_labels_are_found_and_every_part_is_an_experiment(tmp_path: Path) -> None:
    table, told = own.table(written(tmp_path, rows()), "site")
    assert told == "40 rows of 4 silos (site); text: note; label: mood (bad, good)"
    study = grid.parse(table, "mine")
    assert study.name == "study_mine"
    assert [part.name for part in study.parts] == ["performance", "dropout", "label_noise", "attackers"]
    first = study.cells[0].experiment.data
    assert (first.template, first.label, first.silo_column) == ("{note}", "mood", "site")
    assert study.cells[0].experiment.model.name == "minilm"
    assert {cell.seed for cell in study.cells} == {0, 1, 2}
    rates = {cell.at["method"]: cell.experiment.method.lr for cell in study.cells if cell.part.name == "performance"}
    assert rates == {"prefix": 1e-2, "lora": 5e-3, "soft_prompt": 3e-2}, "their own defaults"


def test_answers_are_written_by_a_causal_model_and_have_no_label_noise(tmp_path: Path) -> None:
    path = written(tmp_path, rows(reply=("Thanks, all is well.", "Yes.", "See you", "No", "Well", "Hm")))
    table, told = own.table(path, "site", text="note", answer="reply")
    assert told.endswith("text: note; answer: reply")
    study = grid.parse(table, "mine")
    assert [part.name for part in study.parts] == ["performance", "dropout", "attackers"]
    assert (study.cells[0].experiment.model.name, study.cells[0].experiment.data.answer) == ("smollm2-135m", "reply")


def test_few_silos_are_not_attacked(tmp_path: Path) -> None:
    table, _ = own.table(written(tmp_path, rows(silos=3)), "site", seeds=1)
    assert [part["name"] for part in table["part"]] == ["performance", "dropout", "label_noise"]
    assert table["seeds"] == [0]


def test_another_model(tmp_path: Path) -> None:
    table, _ = own.table(written(tmp_path, rows()), "site", model="my/model")
    assert table["base"]["model"] == {"name": "my/model"}


def test_a_csv_is_as_good(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("site,note,mood\n" + "".join(f"s{i % 2},A note of the day {i},{MOODS[i // 2 % 2]}\n" for i in range(20)))
    assert own.table(path, "site")[1] == "20 rows of 2 silos (site); text: note; label: mood (bad, good)"


@pytest.mark.parametrize(
    ("table", "arguments", "told"),
    [
        (rows(), {"silo_column": "stie"}, "--silo-column stie: .* has no such column; did you mean 'site'"),
        (rows(), {"silo_column": "site", "label": "modo"}, "--label modo: .* did you mean 'mood'"),
        (rows(), {"silo_column": "site", "label": "mood", "answer": "note"}, "--label and --answer: a study is of"),
        (rows(), {"silo_column": "site", "label": "site"}, "a column can be one of them"),
        (rows(silos=1), {"silo_column": "site"}, "all 40 rows say 's0'; a federation has two or more"),
        (rows(size=("big", "small")), {"silo_column": "site"}, "mood, size could each be the label; say which with --label"),
        (BARE, {"silo_column": "site"}, "no column of texts is left for a label or an answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_guessed_is_asked(
    tmp_path: Path, table: list[dict[str, Any]], arguments: dict[str, str], told: str
) -> None:
    path = written(tmp_path, table)
    with pytest.raises(UserError, match=told):
        own.table(path, **arguments)


def test_a_cell_without_anything_is_told_with_its_line(tmp_path: Path) -> None:
    table = rows()
    del table[6]["site"]
    with pytest.raises(UserError, match=r"line 7: nothing in the column 'site' \(--silo-column\)"):
        own.table(written(tmp_path, table), "site")
    table = rows()
    table[6]["mood"] = None
    with pytest.raises(UserError, match=r"line 7: nothing in the column 'mood' \(--label\)"):
        own.table(written(tmp_path, table), "site")


def test_many_labels_are_not_taken_for_texts(tmp_path: Path) -> None:
    table = [{**row, "label": f"kind {i}", "mood": "x"} for i, row in enumerate(rows())]
    with pytest.raises(UserError, match="'label' has 40 different words; if they are labels, say so with --label label"):
        own.table(written(tmp_path, table), "site")


def test_a_column_named_label_wins(tmp_path: Path) -> None:
    assert "label: label (a, b)" in own.table(written(tmp_path, rows(label=("a", "b"))), "site")[1]
