"""A method within a method's settings: which may be named, and that nobody else's table chooses what is imported here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedtailor import experiment, find, trainers, wire
from fedtailor.errors import UserError
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.distill import Distill
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.methods.rag import Rag

MINE = """
from dataclasses import dataclass
from fedtailor.methods.full import Full
@dataclass(frozen=True)
class Mine(Full):
    twist: int = 3
other = 1
"""
FILE = """
name = "x"
[model]
name = "tiny"
[data]
source = "rows.jsonl"
template = "{text}"
answer = "reply"
silo_column = "silo"
public = "public.jsonl"
[method]
name = "distill"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method of the user's in a file beside; whether it was ever imported is seen in sys.modules."""
    (tmp_path / "mine_of_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(wire, "ALLOWED", frozenset({"fedtailor"}))
    monkeypatch.delitem(sys.modules, "mine_of_test", raising=False)
    return "mine_of_test:Mine"


def test_a_table_names_a_method_and_its_settings() -> None:
    assert trainers.named({"name": "lora", "rank": 2, "lr": 0.5}, "trainer") == Lora(rank=2, lr=0.5)
    assert trainers.named({"name": "full"}, "student") == Full()


def test_all_that_average_are_choices() -> None:
    for name, kind in find.methods().items():
        table = {"name": name}
        if issubclass(kind, Averaging) and name != "peft":  # which needs a type
            assert type(trainers.named(table, "trainer")) is kind
        elif not issubclass(kind, Averaging):
            with pytest.raises(ValueError, match=rf"^trainer: '{name}' is no method that trains.*\(choices: .*full.*lora"):
                trainers.named(table, "trainer")


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"rank": 2}, r"trainer needs a name \(choices: adapter, .*; a silo's table replaces all of \[method\.trainer\]"),
        ({"name": "lorra"}, r"trainer: 'lorra' is no method that trains; did you mean 'lora'\? \(choices: adapter, "),
        ({"name": ""}, "trainer: '' is no method that trains"),
        ({"name": "search"}, "trainer: 'search' is no method that trains"),
        ({"name": "fedtailor.methods.search:Search"}, "trainer: 'fedtailor.methods.search:Search' is no method that trains"),
        ({"name": "fedtailor.methods.lora:Nix"}, "trainer: 'fedtailor.methods.lora:Nix': cannot be imported: AttributeError"),
        ({"name": "lora", "rnk": 2}, r"trainer has no setting 'rnk'; did you mean 'rank'\?"),
        ({"name": "lora", "rank": 0}, "trainer rank: .*greater than or equal to 1, not 0"),
        ({"name": "lora", "scaffold": True}, "trainer scaffold: is for a server; leave it out"),
    ],
)
def test_what_cannot_be_named(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}") as error:
        trainers.named(table, "trainer", ("scaffold",), "is for a server")
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_allowed_is_not_even_imported(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table comes over the wire, too: in a method that is unpacked, or in what a silo is told of an embedder."""
    with pytest.raises(ValueError, match=r"^trainer: the package of 'mine_of_test:Mine' is not allowed here; set allow"):
        trainers.named({"name": mine}, "trainer")
    assert "mine_of_test" not in sys.modules
    wire.allow("mine_of_test")  # as the server does
    made = trainers.named({"name": mine, "twist": 5}, "trainer")
    assert (type(made).__name__, vars(made)["twist"]) == ("Mine", 5)
    with pytest.raises(ValueError, match="trainer: 'mine_of_test:other': is no frozen dataclass"):
        trainers.named({"name": "mine_of_test:other"}, "trainer")
    named = {"name": mine}
    sent = [wire.pack(body) for body in (Distill(trainer=named), Distill(student=named), Rag(trainer=named))]
    monkeypatch.setattr(wire, "ALLOWED", frozenset({"fedtailor"}))  # as a silo does not
    monkeypatch.delitem(sys.modules, "mine_of_test")
    for body in sent:
        with pytest.raises(wire.WireError, match="the package of 'mine_of_test:Mine' is not allowed here"):
            wire.unpack(body)
    assert "mine_of_test" not in sys.modules


@pytest.mark.parametrize("place", ["method.trainer", "method.student", "silo.a.trainer", "baseline.alone.trainer"])
def test_who_writes_an_experiment_may_name_their_own(mine: str, tmp_path: Path, place: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'{FILE}\n[{place}]\nname = "{mine}"\ntwist = 4\n')
    table: Any = experiment.as_table(experiment.load(file))
    for key in place.split("."):
        table = table[key]
    assert table == {"name": mine, "twist": 4}
    file.write_text(f'{FILE}\n[{place}]\nname = "mine_of_test:Nix"\n')
    with pytest.raises(UserError, match="'mine_of_test:Nix': cannot be imported"):
        experiment.load(file)
