"""Tables of an experiment file, checked against the dataclass that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fedtailor.methods.distill import Distill
from fedtailor.methods.lora import Lora
from fedtailor.models import Base
from fedtailor.tables import part


def told(kind: type[Any], values: Any) -> list[str]:
    """The errors. As long as there are any nothing is made."""
    errors = list[str]()
    made = part(kind, values, "[x]", errors)
    assert (made is None) == bool(errors)
    return errors


def test_one_is_not_true() -> None:
    assert told(Lora, {"scaffold": 1, "lr": 1}) == ["[x] scaffold: must be true or false, not 1"]


def test_all_errors_are_told_together() -> None:
    assert len(told(Lora, {"rank": 0, "lr": "much", "local_step": 3, "scaffold": 2})) == 4


def test_a_table_within_a_table_is_checked_as_well() -> None:
    assert part(Distill, {"model": {"name": "tiny", "layers": 3}}, "[x]", []).model == Base("tiny", layers=3)
    (line,) = told(Distill, {"model": {"name": "tiny", "layer": 3}})
    assert line.startswith("[x] model has no setting 'layer'; did you mean 'layers'?")
    (line,) = told(Distill, {"model": {"layers": "x"}})
    assert line.startswith("[x] model layers: ")


@pytest.mark.parametrize("key", ["model", "trainer", "student"])
def test_a_name_where_a_table_is_needed(key: str) -> None:
    assert told(Distill, {key: "lora"}) == [f'[x] {key} must be a table, as {{name = "lora"}}, not \'lora\'']


def test_a_table_without_names_is_not_said_to_have_one() -> None:
    @dataclass(frozen=True)
    class Inner:
        size: int = 1

    assert told(_outer(Inner), {"inner": "a"}) == ["[x] inner must be a table, not 'a'"]


def _outer(inner: type[Any]) -> type[Any]:
    return dataclass(frozen=True)(type("Outer", (), {"__annotations__": {"inner": inner}, "inner": inner()}))


@pytest.mark.parametrize("values", [3, "lora", [1]])
def test_a_value_where_the_part_is_a_table(values: object) -> None:
    assert told(Lora, values) == [f"[x] must be a table, not {values!r}"]


def test_a_setting_that_stands_elsewhere() -> None:
    (line,) = told(Distill, {"lr": 0.1})
    assert line.startswith("[x] has no setting 'lr'; how a model is trained stands in [method.trainer]")
    (line,) = told(Distill, {"server_lr": 0.1})  # of no trainer here
    assert "choices" in line
    assert "method.trainer" not in line


def test_a_setting_of_older_versions_that_said_nothing_is_taken() -> None:
    from fedtailor.faults import Faults

    assert part(Faults, {"nan": [], "sign_flip": [], "dropout": 0.1}, "[faults]", []) == Faults(dropout=0.1)
    assert "write attackers = [...], attack = 'nan'" in told(Faults, {"nan": ["shop"]})[0]
