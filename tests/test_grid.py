"""A study's file, its cells, and what makes two of them one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtailor.errors import UserError
from fedtailor.study import grid
from fedtailor.study.grid import Study

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def a_study(*parts: dict[str, Any], **more: Any) -> Study:
    return grid.parse({"base": str(TINY), "part": list(parts), "seeds": [0, 1], **more}, "x.toml")


def problems(*parts: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as told:
        a_study(*parts, **more)
    return str(told.value)


def test_all_combinations_of_the_axes_and_seeds() -> None:
    one = a_study({"name": "p", "axes": {"method": ["prefix", "lora"], "dropout": [0.0, 0.1, 0.2]}})
    assert len(one.cells) == len(one.runs()) == 2 * 3 * 2
    assert [(dict(c.at), c.seed) for c in one.cells[:3]] == [
        ({"method": "prefix", "dropout": 0.0}, 0),
        ({"method": "prefix", "dropout": 0.0}, 1),
        ({"method": "prefix", "dropout": 0.1}, 0),
    ]  # fmt: skip
    last = one.cells[-1].experiment
    assert (type(last.method).__name__, last.faults.dropout, last.seeds, last.rows) == ("Lora", 0.2, (1,), ("federated",))
    assert last.model.name == "tiny"


def test_a_choice_lays_many_settings_and_takes_others_away() -> None:
    even = {"data": {"partition": "iid", "silos": 2}, "remove": ["data.silo_column"], "method.lr": 0.5}
    one = a_study({"name": "p", "axes": {"where": ["even", "natural"]}}, choice={"where": {"even": even, "natural": {}}})
    first, second = one.cells[0].experiment, one.cells[2].experiment
    assert (first.data.partition, first.data.silos, first.data.silo_column, first.method.lr) == ("iid", 2, "", 0.5)
    assert (second.data.partition, second.data.silo_column) == ("column", "site")


def test_a_part_has_choices_and_settings_of_its_own_and_the_axis_wins() -> None:
    low = {"rate": {"low": {"method.lr": 0.01}}}
    one = a_study(
        {"name": "p", "set": {"method.lr": 0.1, "rounds": 3}, "axes": {"rate": ["low"]}, "choice": low},
        choice={"rate": {"low": {"method.lr": 0.7}}},
    )
    assert (one.cells[0].experiment.method.lr, one.cells[0].experiment.rounds) == (0.01, 3)


def test_another_method_leaves_out_what_the_base_says_of_its_own() -> None:
    one = a_study({"name": "p", "axes": {"method": ["lora"]}}, seeds=[0])
    assert one.cells[0].experiment.method.local_steps == 2, "shared by both"
    assert not hasattr(one.cells[0].experiment.method, "virtual_tokens")


def test_parts_share_the_runs_that_are_the_same_with_all_rows_that_either_asks() -> None:
    one = a_study(
        {"name": "a", "axes": {"dropout": [0.0]}, "rows": ["federated", "centralized"]},
        {"name": "b", "axes": {"participation": [1.0, 0.5]}, "rows": ["zero_shot", "federated"]},
        seeds=[0],
    )
    runs = one.runs()
    assert [len(one.cells), len(runs)] == [3, 2]
    assert runs[0].experiment.rows == ("zero_shot", "federated", "centralized")
    assert one.cells[0].experiment.rows == ("federated", "centralized"), "a part's cell knows its own"


def test_a_key_is_of_what_is_computed() -> None:
    def key(**over: Any) -> str:
        return a_study({"name": "p", "set": over}, seeds=[0]).cells[0].key

    assert key() == key(name="other") == key(**{"faults.attack": "gaussian"}), "no attackers: nobody attacks so"
    others = [key(**{"method.lr": 0.5}), key(rounds=3), key(**{"faults.attackers": 0.4})]
    assert len({key(), *others, key(**{"faults.attackers": 0.4, "faults.attack": "gaussian"})}) == 5
    assert a_study({"name": "p"}, seeds=[3]).cells[0].key != key()


def test_a_setting_written_out_at_its_default_is_the_same() -> None:
    one, other = (a_study({"name": "p", "set": over}, seeds=[0]) for over in ({}, {"method.server_beta2": 0.99}))
    assert one.cells[0].key == other.cells[0].key


def test_combinations_can_be_left_out() -> None:
    one = a_study({"name": "p", "axes": {"dropout": [0.0, 0.1], "noise": [0.0, 0.1]}, "skip": [{"dropout": 0.1, "noise": 0.1}]})
    assert len(one.cells) == 3 * 2


def test_the_line_and_what_it_is_compared_with() -> None:
    part = a_study({"name": "p", "axes": {"method": ["lora"], "dropout": [0.3, 0.0]}, "reference": 0.0}).parts[0]
    assert (part.line, part.against) == ("dropout", 0.0)
    part = a_study({"name": "p", "axes": {"method": ["lora", "prefix"], "dropout": [0.3, 0.0]}, "along": "method"}).parts[0]
    assert (part.line, part.against) == ("method", "lora")
    part = a_study({"name": "p"}).parts[0]
    assert (part.line, part.against) == ("", None)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([{"name": "P p"}], "name 'P p' must be of small letters"),
        ([{"name": "p", "axs": {}}], "[[part]] p has no setting 'axs'; did you mean 'axes'"),
        ([{"name": "p"}, {"name": "p"}], "two parts are named 'p'"),
        ([{"name": "p", "axes": {"dropuot": [0.1]}}], "no axis 'dropuot'; did you mean 'dropout'"),
        ([{"name": "p", "axes": {"dropout": []}}], "one or more values"),
        ([{"name": "p", "axes": {"dropout": [0.1, 2.0]}}], "[[part]] p (dropout 2): [faults] dropout: "),
        ([{"name": "p", "axes": {"where": ["even", "nowhere"]}}], "no [choice.where.nowhere]"),
        ([{"name": "p", "along": "y", "axes": {"dropout": [0.1]}}], "along: no axis 'y'"),
        ([{"name": "p", "reference": 7, "axes": {"dropout": [0.1]}}], "reference: 7 is no value"),
        ([{"name": "p", "base": "nowhere.toml"}], "base = 'nowhere.toml': no such file"),
        ([{"name": "p", "rows": ["fed"]}], "rows"),
        ([{"name": "p", "metric": "acuracy"}], "no metric 'acuracy'; did you mean 'accuracy'"),
        ([{"name": "p", "axes": {"dropout": [0.1]}, "skip": [{"dropuot": 0.1}]}], "is no combination of the axes"),
        ([{"name": "p", "axes": {"dropout": [0.1]}, "skip": [{}]}], "is no combination of the axes"),
        ([{"name": "p", "set": {"remove": ["data.silo_colum"]}}], "the base has no setting 'data.silo_colum'"),
        ([{"name": "p", "set": {"remove": ["rounds.x"]}}], "the base has no setting 'rounds.x'"),
        ([{"name": "p", "axes": {"dropout": [0.1], "faults.dropout": [0.2]}}], "'dropout' and 'faults.dropout' both set"),
        ([], "one [[part]]"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(parts: list[dict[str, Any]], told: str) -> None:
    choice = {"where": {"even": {"data.silos": 2}}} if parts and "where" in parts[0].get("axes", {}) else {}
    assert told in problems(*parts, choice=choice)


def test_choices_of_nobody_and_names_of_no_folder_are_told() -> None:
    part = {"name": "p", "axes": {"method": ["lora"]}}
    assert "choice.methd.lora: no part has an axis 'methd' with it; did you mean 'method'" in problems(
        part, choice={"methd": {"lora": {"method.lr": 0.5}}}
    )
    assert "cannot be a folder's" in problems(part, name="../up")
    assert "one of seeds at least" in problems(part, seeds=[])


def test_a_key_is_of_the_rows_and_not_of_their_place(tmp_path: Path) -> None:
    def key(file: Path) -> str:
        return a_study({"name": "p", "set": {"data.source": str(file)}}, seeds=[0]).cells[0].key

    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(TINY.with_suffix(".jsonl").read_text())
    other.write_text(one.read_text())
    before = key(one)
    assert key(other) == before == a_study({"name": "p"}, seeds=[0]).cells[0].key
    other.write_text(one.read_text().replace("lovely", "loathed"))
    assert key(other) != before


def test_all_mistakes_are_told_at_once() -> None:
    told = problems({"name": "a", "axes": {"dropout": [2.0]}}, {"name": "b", "axes": {"method": ["lroa"]}}).splitlines()
    assert len(told) == 2
    assert "did you mean 'lora'" in told[1]


def test_a_file_without_parts_is_an_experiment() -> None:
    with pytest.raises(UserError, match=r"no \[\[part\]\], so it is no study; an experiment is run with `fedtailor run"):
        grid.load(TINY)


def test_a_file_with_settings_laid_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'base = "{TINY}"\n[[part]]\nname = "p"\n')
    one = grid.load(file, ["seeds=[5]"])
    assert (one.name, [c.seed for c in one.cells]) == ("mine", [5])
    text = TINY.read_text()
    (tmp_path / "tiny.jsonl").write_text(TINY.with_suffix(".jsonl").read_text())
    file.write_text("[base]\n" + text.replace("\n[", "\n[base.") + '\n[[part]]\nname = "p"\n')
    one = grid.load(file, ["base.method.lr=0.25"])
    assert one.cells[0].experiment.method.lr == 0.25
    assert one.cells[0].experiment.data.source == str(tmp_path / "tiny.jsonl"), "relative to the study's folder"
