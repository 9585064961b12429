"""An experiment file: its schema, all its errors together, and what is laid over it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtailor.errors import UserError
from fedtailor.experiment import as_table, load, parse
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


GOOD = {
    "name": "good",
    "data": {"source": "rows.csv", "template": "{text}", "label": "mood", "silo_column": "site"},
    "method": {"name": "lora", "rank": 4},
}


def errors(table: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as told:
        parse(table, "x.toml")
    lines = str(told.value).splitlines()
    assert all(line.startswith("x.toml: ") for line in lines), lines
    return [line.removeprefix("x.toml: ") for line in lines]


def changed(**parts: Any) -> dict[str, Any]:
    return {**GOOD, **parts}


def test_a_good_table_becomes_an_experiment() -> None:
    found = parse(GOOD, "x.toml")
    assert isinstance(found.method, Lora)
    assert (found.method.rank, found.data.label, found.name) == (4, "mood", "good")
    assert (found.rounds, found.participation, found.seeds) == (4, 1.0, (0,))
    assert found.rows == ("zero_shot", "few_shot", "alone", "federated", "centralized")
    assert found.model.name == "smollm2-135m"


def test_all_errors_of_a_file_are_told_together() -> None:
    told = errors(
        {
            "name": "bad",
            "rouns": 3,
            "participation": 2.0,
            "data": {"source": "x", "template": "{t}", "answer": "a", "label": "b", "silo_column": "s"},
            "model": {"dtype": "int8"},
            "method": {"name": "lora", "rnak": 4, "lr": -1.0, "optimizer": "adam"},
            "evaluate": {"every": 0},
            "engine": {"cohort": "some"},
            "faults": {"dropout": 1.5},
            "silo": {"north": {"rakn": 2}},
        }
    )
    begins = [
        "[model] dtype: ", "[data]: set exactly one of answer, label and messages, not answer and label",
        "[evaluate] every: ", "[engine] cohort", "[faults] dropout: ", "[method] has no setting 'rnak'; did you mean 'rank'?",
        "[method] lr: ", "[method] optimizer: ", "no setting 'rouns' at the top; did you mean 'rounds'?", "participation: ",
    ]  # fmt: skip
    for begin in begins:
        assert any(line.startswith(begin) for line in told), (begin, told)
    assert not any("Field required" in line for line in told), "what is there, though wrong, is not missing"


ONE_EACH = {
    "a misspelt method": (
        changed(method={"name": "loar"}),
        "method.name = 'loar': no such method; did you mean 'lora'? (choices: adapter, ",
    ),
    "no method": ({k: v for k, v in GOOD.items() if k != "method"}, "[method] needs a name (choices: adapter, "),
    "a method without a name": (changed(method={"rank": 3}), "[method] needs a name (choices: adapter, "),
    "a method that is a text": (changed(method="lora"), "[method] needs a name"),
    "a misspelt setting": (
        changed(method={"name": "prefix", "virtual_token": 3}),
        "[method] has no setting 'virtual_token'; did you mean 'virtual_tokens'? (choices: accumulate, ",
    ),
    "a misspelt aggregator": (
        changed(method={"name": "lora", "aggregate": "medain"}),
        "method.aggregate = 'medain': no such function; did you mean 'median'?",
    ),
    "a wrong type": (
        changed(method={"name": "lora", "local_steps": "many"}),
        "[method] local_steps: Input should be a valid integer, unable to parse string as an integer, not 'many'",
    ),
    "out of range": (changed(rounds=0), "rounds: Input should be greater than or equal to 1, not 0"),
    "a setting's own check": (
        changed(method={"name": "prefix", "init_text": "  "}),
        "[method]: init_text is only white space",
    ),
    "a choice that is none": (
        changed(method={"name": "lora", "schedule": "step"}),
        "[method] schedule: Input should be 'constant', 'linear' or 'cosine', not 'step'",
    ),
    "an unknown row": (changed(rows=["federate"]), "rows.0: Input should be 'zero_shot', "),
    "no rows": (changed(rows=[]), "rows must be one or more, all different, not []"),
    "no seeds": (changed(seeds=[]), "seeds must be one or more, all different, not []"),
    "a seed twice": (changed(seeds=[1, 2, 1]), "seeds must be one or more, all different, not [1, 2, 1]"),
    "a name that leads elsewhere": (changed(name="../up"), "name '../up' cannot be a folder's"),
    "no name": (changed(name=""), "name '' cannot be a folder's"),
    "no data": ({k: v for k, v in GOOD.items() if k != "data"}, "[data] source: Field required"),
    "data that is a text": (changed(data="rows.csv"), "[data] must be a table, not 'rows.csv'"),
    "two of answer and label": (
        changed(data={**GOOD["data"], "answer": "a"}),  # type: ignore[dict-item]
        "[data]: set exactly one of answer, label and messages, not answer and label",
    ),
    "an unknown silo setting": (
        changed(silo={"north": {"ranks": 2}}),
        "[silo.north] has no setting 'ranks'; did you mean 'rank'? (choices: accumulate, answer, ",
    ),
    "a setting that no silo may have for itself": (
        changed(silo={"north": {"server_lr": 2.0}}),
        "[silo.north] has no setting 'server_lr'",
    ),
    "a silo's setting out of range": (
        changed(silo={"north": {"lr": -1}}),
        "[silo.north] lr: Input should be greater than 0, not -1",
    ),
    "a silo's rank above the method's": (
        changed(silo={"north": {"rank": 5}}),
        "[silo.north] rank = 5 is above [method] rank = 4: raise that one",
    ),
    "a silo that is a number": (changed(silo={"north": 5}), "silo.north: Input should be a valid dictionary, not 5"),
    "silos that are a number": (changed(silo=5), "silo: Input should be a valid dictionary, not 5"),
    "a misspelt setting of a baseline": (
        changed(baseline={"alone": {"lrr": 0.1}}),
        "[baseline.alone] has no setting 'lrr'; did you mean 'lr'?",
    ),
    "a baseline's setting out of range": (
        changed(baseline={"centralized": {"lr": -1}}),
        "[baseline.centralized] lr: Input should be greater than 0, not -1",
    ),
    "a baseline that trains nothing": (
        changed(baseline={"few_shot": {"lr": 0.1}}),
        "baseline.few_shot.[key]: Input should be 'alone', 'centralized' or 'routed', not 'few_shot'",
    ),
    "an unknown part": (
        changed(enginge={}),
        "no setting 'enginge' at the top; did you mean 'engine'? (choices: baseline, data, ",
    ),
    "a metric that is none": (changed(evaluate={"best_by": "acuracy"}), "[evaluate] best_by: "),
    "a limit that none can meet": (
        changed(method={"name": "lora", "max_delta_norm": -1.0}),
        "[method] max_delta_norm: ",
    ),
}


@pytest.mark.parametrize(("table", "said"), ONE_EACH.values(), ids=ONE_EACH.keys())
def test_each_error_is_one_line_with_place_value_and_choices(table: dict[str, Any], said: str) -> None:
    told = errors(table)
    assert len(told) == 1, told
    assert told[0].startswith(said), told[0]


def test_a_baseline_may_be_trained_at_its_own_rate() -> None:
    found = parse(changed(baseline={"centralized": {"lr": "0.5", "local_steps": 3}}), "x.toml")
    assert found.method_of("centralized") == replace(found.method, lr=0.5, local_steps=3)
    assert found.method_of("alone") is found.method_of("federated") is found.method
    assert parse(as_table(found), "y.toml").method_of("centralized") == found.method_of("centralized")


def test_a_silo_may_have_settings_of_its_own() -> None:
    found = parse(changed(silo={"north": {"rank": 2, "lr": 0.1, "template": "{note}"}}), "x.toml")
    assert found.silo == {"north": {"rank": 2, "lr": 0.1, "template": "{note}"}}


def test_a_file_is_read_with_its_name_and_its_data_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load(TINY)
    assert found.name == "tiny"
    assert Path(found.data.source) == TINY.with_name("tiny.jsonl")
    assert found.method == Prefix(virtual_tokens=4, local_steps=2, batch_size=2)


def test_what_is_laid_over_a_file() -> None:
    sets = [
        "rounds=7", "method.lr = 0.5", "method.init_text=Say it", "seeds=[3, 4]", "engine.cohort=auto",
        "silo.shop.virtual_tokens=2", "data.template={text} =", "name=other", "method.projection=true",
    ]  # fmt: skip
    found = load(TINY, sets)
    assert (found.rounds, found.seeds, found.name, found.engine.cohort) == (7, (3, 4), "other", "auto")
    assert (found.method.lr, found.method.init_text, found.method.projection) == (0.5, "Say it", True)
    assert found.silo == {"shop": {"virtual_tokens": 2}}
    assert found.data.template == "{text} ="


def test_a_later_value_and_the_seed_asked_win() -> None:
    found = load(TINY, ["rounds=7", "rounds=8", "seeds=[3, 4]"], seed=9)
    assert (found.rounds, found.seeds) == (8, (9,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds", "--set rounds: write part.key=value"),
        ("=5", "--set =5: write part.key=value"),
        ("rounds.x=5", "--set rounds.x=5: rounds is a value, not a table"),
        ("data.source.x=5", "source is a value, not a table"),
    ],
)
def test_what_cannot_be_laid_over(text: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        load(TINY, [text])
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"rounds = = 3", "not readable as TOML"), (b"name = '\xff'", "not readable as TOML")],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "some.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as told:
        load(file)
    assert str(told.value).startswith(f"{file}: ")
    assert said in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["rounds=3", "seeds=[1,2]", "rows=['alone','federated']", "participation=0.5", "faults.attackers=['shop']"],
        ["silo.shop.virtual_tokens=2", "engine.cohort=3", "data.max_words=50", "method.max_delta_norm=2.5"],
        ['method.init_text=a"b\\nc', "data.labels=['good','bad']", "model.revision=main"],
        ["method={name='lora', targets=['q_proj'], rank=3}", "silo.shop={rank=2, template='{text}!'}"],
    ],
)
def test_what_is_written_out_reads_back_as_the_same(sets: list[str]) -> None:
    found = load(TINY, sets)
    table = as_table(found)
    assert parse(tomllib.loads(tomli_w.dumps(table)), "back") == found
    assert as_table(parse(table, "back")) == table


def test_another_method_than_the_files_own(tmp_path: Path) -> None:
    """What only the file's own method has is left out, and its lr with it, wherever they stand; what was asked for stays."""
    file = tmp_path / "x.toml"
    file.write_text(
        tomli_w.dumps(
            changed(
                method={"name": "prefix", "lr": 0.5, "virtual_tokens": 4, "local_steps": 3},
                baseline={"centralized": {"lr": 0.25, "virtual_tokens": 2, "local_steps": 5}},
                silo={"north": {"virtual_tokens": 2, "lr": 0.125, "batch_size": 2, "max_words": 9}},
            )
        )
    )
    found = load(file, ["method.name=lora"])
    assert found.method == Lora(local_steps=3)
    assert found.baseline == {"centralized": {"local_steps": 5}}
    assert found.silo == {"north": {"batch_size": 2, "max_words": 9}}
    found = load(file, ["method.name=lora", "method.lr=0.1", "silo.north.lr=0.2", "baseline.centralized.lr=0.3"])
    assert found.method == Lora(local_steps=3, lr=0.1)
    assert found.silo["north"]["lr"] == 0.2
    assert found.baseline["centralized"]["lr"] == 0.3
    found = load(file, ['method={name="lora", lr=0.1}', "silo.north={lr=0.2}", "baseline={centralized={lr=0.3}}"])
    assert (found.method, found.silo["north"], found.baseline["centralized"]) == (Lora(lr=0.1), {"lr": 0.2}, {"lr": 0.3})
    assert load(file, ["method.name=prefix"]).method == Prefix(lr=0.5, virtual_tokens=4, local_steps=3)


@pytest.mark.parametrize("table", [changed(rounds=True), changed(seeds=[True]), changed(silo={"north": {"lr": True}})])
def test_true_is_no_number(table: dict[str, Any]) -> None:
    assert any("must not be true or false, not " in line for line in errors(table))


def test_a_silos_settings_are_kept_as_checked() -> None:
    found = parse(changed(silo={"north": {"local_steps": "2", "batch_size": 2.0}}), "x.toml")
    assert found.silo == {"north": {"local_steps": 2, "batch_size": 2}}
    assert all(type(value) is int for value in found.silo["north"].values())


def test_a_silo_may_learn_something_else() -> None:
    assert parse(changed(silo={"north": {"answer": "text"}}), "x.toml").silo == {"north": {"answer": "text"}}


def test_a_relative_model_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "one.toml").write_bytes(tomli_w.dumps(changed(model={"name": "base"})).encode())
    monkeypatch.chdir("/")
    assert load(tmp_path / "one.toml").model.name == str((tmp_path / "base").resolve())


def test_an_unreadable_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"x\.toml: cannot be read .Permission denied.; check its permissions"):
        load(tmp_path / "x.toml")
