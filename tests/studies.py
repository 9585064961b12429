"""What tests of a study's report share: a grid over the tiny experiment, and figures that were never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedtailor.study import grid
from fedtailor.study.grid import Study
from fedtailor.study.measured import Found
from tiny_runs import TINY

NOTHING = {"method": "evaluate.samples", "aggregate": "evaluate.max_new_tokens", "attack": "evaluate.examples",
           "attackers": "method.local_steps"}  # fmt: skip

Given = float | Mapping[str, Any] | None  # an accuracy; or figures, with "rounds" among them; None: not finished


def study(*parts: Mapping[str, Any], seeds: tuple[int, ...] = (0, 1, 2), **head: Any) -> Study:
    """Axes that have no setting take their values from `choice`, as in a file."""
    return grid.parse({"base": str(TINY), "seeds": list(seeds), "part": list(parts), **head}, "a test", TINY.parent)


def nothing(axis: str, *values: Any) -> dict[str, Any]:
    """A `choice` whose values change something, but nothing that matters here; each axis another setting."""
    setting = NOTHING.get(axis, "evaluate.every")
    return {axis: {str(value): {setting: 1 + i} for i, value in enumerate(values)}}


def found(one: Study, given: Callable[[Mapping[str, Any], str, int], Given]) -> list[Found]:
    """`given` says what (point, row, seed) comes to."""
    told = []
    for cell in one.cells:
        for row in cell.part.rows:
            value = given(cell.at, row, cell.seed)
            if value is None:
                continue
            figures = dict(value) if isinstance(value, Mapping) else accuracy(value)
            told.append(Found(cell, row, figures, tuple(figures.pop("rounds", ()))))
    return told


def accuracy(value: float) -> dict[str, Any]:
    return {"accuracy": {"mean": value, "worst": value, "per_silo": {}, "pooled": value}}


def logged(*rounds: tuple[int, float, float | None], silos: int = 2) -> list[dict[str, Any]]:
    """(bytes up, seconds, validation accuracy) of round 0, 1, ...; as many bytes go down as up."""
    return [
        {"round": number, "bytes_up": up, "bytes_down": up, "seconds": seconds,
         **({"silos": [f"s{i}" for i in range(silos)]} if number else {}),
         **({"val": accuracy(told)} if told is not None else {})}
        for number, (up, seconds, told) in enumerate(rounds)
    ]  # fmt: skip
