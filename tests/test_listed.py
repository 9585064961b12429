"""Settings written as files: a value a line, in the experiment once it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtailor import experiment
from fedtailor.errors import UserError
from fedtailor.listed import inlined
from fedtailor.methods.search import Search
from fedtailor.prompts import Prompt
from tiny_runs import TINY


def read(folder: Path, name: str, text: str) -> object:
    (folder / name).write_text(text, encoding="utf-8")
    settings: dict[str, object] = {"prompts": name, "calls": 3}
    inlined(settings, ("prompts", "examples"), folder)
    assert settings["calls"] == 3
    return settings["prompts"]


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    assert read(tmp_path, "p.txt", "{input}\\nMood:\n\nJudge: {input}\n") == ["{input}\nMood:", "Judge: {input}"]


def test_jsonl_is_a_value_a_line(tmp_path: Path) -> None:
    told = '"{input}:"\n{"template": "{input}", "words": ["a", "b"]}\n{"input": "x", "answer": "y"}\n'
    assert read(tmp_path, "p.jsonl", told) == ["{input}:", {"template": "{input}", "words": ["a", "b"]}, ["x", "y"]]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("p.jsonl", '"{input}"\n{"template"', "line 2: not JSON"),
        ("p.txt", " \n\n", "is empty; write a value a line"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(name: str, text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        read(tmp_path, name, text)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"\[method\] prompts = 'none.txt': no such file"):
        inlined({"prompts": "none.txt"}, ("prompts",), Path())


def test_an_experiment_is_whole_without_the_file(tmp_path: Path) -> None:
    prompts, examples = tmp_path / "p.txt", tmp_path / "e.jsonl"
    prompts.write_text("{input} is\n")
    examples.write_text('{"input": "tea", "answer": "good"}\n')
    found = experiment.load(TINY, ["method.name=search", f'method.prompts="{prompts}"', f'method.examples="{examples}"'])
    assert isinstance(found.method, Search)
    assert found.method.prompts == ("{input} is",)
    assert found.method.examples == (("tea", "good"),)
    prompts.unlink()
    assert experiment.parse(experiment.as_table(found), "again") == found


def test_prompts_of_all_kinds_come_back_from_the_written_experiment(tmp_path: Path) -> None:
    table = '[{template="{input}:", words=["no", "yes"], examples=[["a", "bad"]]}, "{prompt}"]'
    endpoint = 'method.endpoint={url="http://h", model="m"}'
    found = experiment.load(TINY, ["method.name=search", f"method.prompts={table}", endpoint])
    assert found.method.prompts == (Prompt("{input}:", ("no", "yes"), (("a", "bad"),)), "{prompt}")
    assert experiment.parse(experiment.as_table(found), "again") == found


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ('method.prompts=[{template="{input}", word=["a"]}]', "word"),
        ('method.prompts=["no slot"]', "has no slot for the row; write {input} once"),
        ("method.prompts=[]", "prompts is empty"),
        ('method.endpoint={url="http://h", model="m", modle="x"}', "modle"),
        ('method.endpoint={url="h", model="m"}', "must begin with http"),
        ('method.bandit="halvin"', "did you mean 'halving'"),
    ],
)
def test_errors_of_a_file_are_one_line(sets: str, why: str) -> None:
    with pytest.raises(UserError) as error:
        experiment.load(TINY, ["method.name=search", sets])
    assert why in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
