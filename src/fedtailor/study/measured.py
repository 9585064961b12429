"""Folders of cells -> figures: one `Found` for each row of each cell that is finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor import plots
from fedtailor.figures import METRICS, is_number
from fedtailor.files import read_json
from fedtailor.study.conduct import folder_of
from fedtailor.study.grid import Cell, Part, Study, Value


@dataclass(frozen=True)
class Found:
    """One row (federated, centralized, ...) of one finished cell."""

    cell: Cell
    row: str
    figures: Mapping[str, Any]  # as result.json has the row: metrics with mean, worst, per_silo and mostly pooled; costs
    rounds: tuple[Mapping[str, Any], ...] = ()  # rounds.jsonl; empty for rows without training, and for `alone`
    flops: Mapping[str, float] = field(default_factory=dict)  # see `flops.of`; of the row federated
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, device, threads, model, sha256 of data

    @property
    def part(self) -> str:
        return self.cell.part.name

    @property
    def at(self) -> Mapping[str, Value]:
        return self.cell.at

    @property
    def seed(self) -> int:
        return self.cell.seed

    def value(self, metric: str, over: str = "") -> float | None:
        """A metric of this row: over all test rows together where it was counted so and the part asks it, else over silos."""
        told = self.figures.get(metric)
        if not isinstance(told, Mapping):
            return float(told) if told is not None and is_number(told) else None
        wanted = "pooled" if (over or self.cell.part.over) == "rows" and "pooled" in told else "mean"
        found = told.get(wanted)
        return float(found) if found is not None and is_number(found) else None


def read(study: Study, root: Path) -> list[Found]:
    """All that is finished, in the order of the cells and of each cell's rows."""
    held: dict[tuple[str, str], tuple[dict[str, Any], tuple[Mapping[str, Any], ...]]] = {}
    told: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    found = []
    for cell in study.cells:
        folder = folder_of(root, cell)
        if cell.key not in told:
            result, counted = folder / "result.json", folder / "flops.json"
            environment = dict(read_json(result)["environment"]) if result.exists() else {}
            told[cell.key] = environment, read_json(counted) if counted.exists() else {}
        for row in cell.part.rows:
            if (cell.key, row) not in held:
                file = folder / "rows" / row / "row.json"
                if not file.exists():
                    continue
                log = file.with_name("rounds.jsonl")
                held[cell.key, row] = read_json(file), tuple(plots.read_rounds(log)) if log.exists() else ()
            figures, rounds = held[cell.key, row]
            environment, operations = told[cell.key]
            found.append(Found(cell, row, figures, rounds, operations if row == "federated" else {}, environment))
    return found


def metric_of(part: Part, found: Iterable[Found]) -> str:
    """What the part is judged by."""
    if part.metric:
        return part.metric
    there = {name for one in found if one.part == part.name for name, told in one.figures.items() if isinstance(told, dict)}
    for name in ("accuracy", "recall_at_5", "rouge_l", "loss"):
        if name in there:
            return name
    return next((name for name in METRICS if name in there), "loss")
