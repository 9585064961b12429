"""What a study would cost: cells, hours, bytes. Hours come from cells that are finished, else from a trial of each kind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtailor import data as rows_of
from fedtailor import evaluate as scoring
from fedtailor import models, wire
from fedtailor.baselines import zero_shot
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.evaluate import Evaluate
from fedtailor.experiment import Experiment, as_table, drawn
from fedtailor.files import read_json
from fedtailor.methods.averaging import Averaging
from fedtailor.study.conduct import Held, folder_of, missing_rows
from fedtailor.study.grid import Cell, Study
from fedtailor.study.points import UNTRAINED

TRIED = 32  # rows that are scored to see how long one takes


@dataclass(frozen=True)
class Work:
    """What one row of one cell has to do."""

    trained: int  # rows that are trained on
    scored: int  # validation and test rows that are scored
    up: int  # bytes, all silos and rounds
    down: int


@dataclass(frozen=True)
class Sizes:
    """Of the rows of one deal."""

    silos: int
    val: int  # rows
    test: int


@dataclass
class Cost:
    """Of the cells that are not finished yet."""

    cells: int = 0
    finished: int = 0
    seconds: float = 0.0
    unknown: int = 0  # cells whose method says neither steps nor bytes
    up: int = 0
    down: int = 0


def of(study: Study, root: Path) -> dict[str, Cost]:
    """By part. A cell that parts share counts for the first."""
    held = Held()
    found = {part.name: Cost() for part in study.parts}
    rates: dict[str, tuple[float, float]] = {}  # by kind
    replies: dict[str, int] = {}  # by method: bytes
    sizes: dict[str, Sizes] = {}  # by how rows are dealt: hundreds of cells share some tens of deals
    for cell in study.runs():
        cost = found[cell.part.name]
        rows = missing_rows(folder_of(root, cell), cell.experiment.rows)
        if not rows:
            cost.finished += 1
            continue
        cost.cells += 1
        if not isinstance(cell.experiment.method, Averaging):
            seconds = _like(study, root, cell)
            cost.seconds += seconds or 0.0
            cost.unknown += seconds is None
            continue
        kind, method, deal = _kind(cell.experiment), _method(cell.experiment), Held.key(cell.experiment)
        if kind not in rates or method not in replies or deal not in sizes:
            loaded, resident = held.prepared(cell.experiment)
            sizes[deal] = _sizes(loaded)
            if kind not in rates:
                rates[kind] = _rates(cell.experiment, loaded, resident)
            if method not in replies:
                labels = max(len(rows.labels) for rows in loaded.silos.values())
                replies[method] = len(wire.pack(cell.experiment.method.example(resident, labels)))
        train, score = rates[kind]
        for row in rows:
            work = _work(cell.experiment, row, sizes[deal], replies[method])
            cost.seconds += work.trained * train + work.scored * score
            cost.up += work.up
            cost.down += work.down
    return found


def _kind(experiment: Experiment) -> str:
    """Cells of one kind take about as long for a row."""
    table = as_table(experiment)
    method = {k: v for k, v in table["method"].items() if k in ("name", "rank", "virtual_tokens", "batch_size", "optimizer")}
    return f"{table['model']} {method} {table['data']['source']} {table['data'].get('max_words')}"


def _like(study: Study, root: Path, cell: Cell) -> float | None:
    """Seconds of the finished cells of the same part; None without any."""
    took = []
    for other in study.runs():
        folder = folder_of(root, other)
        if other.part == cell.part and not missing_rows(folder, other.experiment.rows):
            rows = [read_json(folder / "rows" / row / "row.json") for row in other.experiment.rows]
            took.append(sum(row.get("seconds", 0.0) + row.get("evaluation_seconds", 0.0) for row in rows))
    return sum(took) / len(took) if took else None


def _method(experiment: Experiment) -> str:
    """What decides how many bytes a reply has."""
    table = as_table(experiment)
    return f"{table['model']} {table['method']} {table['data']['source']} {table['data'].get('labels')}"


def _sizes(loaded: rows_of.Loaded) -> Sizes:
    val, test = (sum(len(getattr(rows, part)) for rows in loaded.silos.values()) for part in ("val", "test"))
    return Sizes(len(loaded.silos), val, test)


def _work(experiment: Experiment, row: str, sizes: Sizes, reply: int) -> Work:
    """Down go the same tensors as up, so it is taken for as many bytes."""
    method = experiment.method_of(row)
    silos, rounds = sizes.silos, experiment.rounds
    if row in UNTRAINED:
        return Work(0, sizes.test, 0, 0)
    validations = 1 + rounds // experiment.evaluate.every + bool(rounds % experiment.evaluate.every)
    steps = rounds * method.local_steps * method.batch_size * method.accumulate
    if row == "alone":
        sent = reply * rounds * silos
        return Work(steps * silos, validations * sizes.val + silos * sizes.test, sent, sent)
    here = drawn(silos, experiment.participation)
    sent = reply * rounds * (here if row == "federated" else 1)
    return Work(steps * here, validations * sizes.val + sizes.test, sent, sent)


def _rates(experiment: Experiment, loaded: rows_of.Loaded, resident: models.Resident) -> tuple[float, float]:
    """Seconds for a row that is trained on, and for one that is scored: the second of two trials, the first warms up."""
    name, rows = max(loaded.silos.items(), key=lambda one: len(one[1].train))
    method = replace(experiment.method, local_steps=2, aggregate="mean")
    seen = method.local_steps * method.batch_size * method.accumulate
    train = min(_timed_round(experiment, method, {name: rows}, resident) for _ in range(2)) / seen
    some = _first([row for one in loaded.silos.values() for row in one.test] or list(rows.train))
    body = Evaluate(zero_shot({name: rows}), "test", experiment.evaluate.max_new_tokens)
    engine = InProcess({name: SiloData((), (), some, rows.labels)}, {"base": resident})
    score = min(_timed(lambda: scoring.ask_all(engine.reach(0), body)) for _ in range(2)) / len(some)
    return train, score


def _timed_round(experiment: Experiment, method: Any, data: dict[str, SiloData], resident: models.Resident) -> float:
    engine = InProcess(data, {"base": resident}, rounds=1)
    state = method.begin(engine.reach(0))
    return _timed(lambda: method.round(state, engine.reach(1)))


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _first(rows: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(rows[:: max(1, len(rows) // TRIED)][:TRIED])
