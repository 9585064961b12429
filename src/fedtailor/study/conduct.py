"""Cells -> folders. Each distinct experiment runs once, in a folder named by its content; what is finished stays so.

    runs/<study>/  study.toml  cells/<key>/{experiment.toml, plan.json, rows/<row>/{row.json, rounds.jsonl}, result.json}

Any number of processes may work at one study: a cell is taken by the lock of its folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedtailor import data as rows_of
from fedtailor import models, preparing, progress, runs, wire
from fedtailor.errors import FedtailorError, UserError
from fedtailor.experiment import Experiment, as_table
from fedtailor.files import held, read_json, write_json
from fedtailor.study import flops, grid
from fedtailor.study.grid import Cell, Study

HELD = 2  # tables of rows that are kept at hand: cells that follow one another often share theirs
HEAVY = ("adapter", "state")  # folders, and files, of models: hundreds would fill a disk
HEAVY_FILES = (".safetensors", ".bin", ".pt")


@dataclass
class Held:
    """What cells share within a process: each base is loaded once, and rows are dealt once for like cells."""

    loaded: OrderedDict[str, rows_of.Loaded] = field(default_factory=OrderedDict)

    @staticmethod
    def key(experiment: Experiment) -> str:
        """Of how rows are dealt."""
        table = as_table(experiment)
        return json.dumps([table["data"], table["silo"], table["seeds"]], sort_keys=True)

    def prepared(self, experiment: Experiment) -> tuple[rows_of.Loaded, models.Resident]:
        key = self.key(experiment)
        found, resident = preparing.prepare(experiment, at_hand=self.loaded.get(key))
        self.loaded[key] = found
        self.loaded.move_to_end(key)
        while len(self.loaded) > HELD:
            self.loaded.popitem(last=False)
        return found, resident


@dataclass
class Progress:
    """How far a study is."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # label of a cell -> why


def folder_of(root: Path, cell: Cell) -> Path:
    return root / "cells" / cell.key


def missing_rows(folder: Path, rows: Sequence[str]) -> list[str]:
    """Of the rows asked, those that are not finished: all, while nothing says on what they were run."""
    whole = (folder / "result.json").exists()
    return [row for row in rows if not whole or not (folder / "rows" / row / "row.json").exists()]


def begin(study: Study, root: Path, made: bool = False) -> None:
    """Take the folder for this study; one that holds another state of its file goes on, with the cells that both share.

    `made`: no file says it. Then a study.toml that is other than it would be is someone's, and is not written over.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: a file, not a folder; choose another with --out")
    if root.is_dir() and any(root.iterdir()) and not (root / "study.toml").exists():
        raise UserError(f"{root}: holds something else than a study; choose another folder with --out")
    file, text = root / "study.toml", tomli_w.dumps(dict(study.source)).encode()
    if made and file.exists() and file.read_bytes() != text:
        other = f"run it with `fedtailor study {file}`, or choose another folder with --out"
        raise UserError(f"{file}: says something else: it was changed, or made with other options; {other}")
    root.mkdir(parents=True, exist_ok=True)
    if file.exists() and grid.same(file, study):
        return  # with its comments
    wire.write_bytes(file, text)


def conduct(study: Study, root: Path, command: str = "", each: Callable[[Cell], None] = lambda cell: None) -> Progress:
    """Run all cells that are not finished; a cell that fails is told, kept in failed.json, and the others go on.

    `each` is called after every finished cell. Cells that another process holds are waited for at the end.
    """
    begin(study, root)
    at_hand, told, cells = Held(), Progress(), study.runs()
    costly = {cell.key for cell in study.cells if cell.part.asks != "robustness"}  # of the others nobody asks operations
    began = time.monotonic()
    mine = 0
    left = cells
    while left:
        waiting: list[Cell] = []
        for cell in left:
            folder = folder_of(root, cell)
            if not missing_rows(folder, cell.experiment.rows):
                told.done += 1
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with held(folder / ".taken") as free:
                if not free:
                    waiting.append(cell)
                    continue
                if not missing_rows(folder, cell.experiment.rows):  # another process finished it meanwhile
                    told.done += 1
                    continue
                progress.line(f"{told.done + len(told.failed) + 1} of {len(cells)}: {cell.label}")
                why = _run(cell, folder, at_hand, command, study.keep, _like(cell, cells, root), cell.key in costly)
            mine += 1
            if why is None:
                told.done += 1
                each(cell)
            else:
                told.failed[cell.label] = why
                progress.line(f"failed: {cell.label}: {why}")
        if waiting and len(waiting) == len(left):
            time.sleep(5)
        left = waiting
    spent = time.monotonic() - began
    if mine:
        progress.line(f"{mine} cells in {spent:.0f} s, {told.done} of {len(cells)} finished")
    return told


def _like(cell: Cell, cells: Sequence[Cell], root: Path) -> dict[str, list[Path]]:
    """Folders whose rows without training are this cell's, too: the same base, rows and scoring; few examples are a seed's."""

    def asked(one: Cell) -> tuple[Any, ...]:
        ours = one.experiment
        judge = ours.method if hasattr(ours.method, "judge") else None  # it asks questions of its own, in its own way
        return ours.model, ours.data, ours.silo, ours.evaluate, judge

    same = [one for one in cells if one.key != cell.key and asked(one) == asked(cell)]
    return {
        "zero_shot": [folder_of(root, one) for one in same],
        "few_shot": [folder_of(root, one) for one in same if one.seed == cell.seed],
    }


def _run(
    cell: Cell, folder: Path, at_hand: Held, command: str, keep: str, others: Mapping[str, Sequence[Path]], counted: bool
) -> str | None:
    """Run a cell's missing rows. Returns why it failed, None when it did not."""
    file = folder / "failed.json"
    try:
        wire.write_bytes(folder / "experiment.toml", tomli_w.dumps(as_table(cell.experiment)).encode())
        prepared = at_hand.prepared(cell.experiment)
        if counted and not (folder / "flops.json").exists():
            write_json(folder / "flops.json", flops.of(cell.experiment, *prepared))
        one = runs.Run(cell.experiment, folder, command, prepared=prepared, content=cell.key, others=others)
        with progress.hushed():
            one.conduct()
    except OSError:  # a full disk is no cell's own
        raise
    except Exception as error:  # one cell's, a bug in it or too little memory: the others go on
        why = str(error) if isinstance(error, FedtailorError) else f"unexpected {type(error).__name__}: {error}"
        write_json(file, {"cell": cell.label, "why": why})
        return why
    file.unlink(missing_ok=True)
    if keep == "figures":
        _lighten(folder)
    return None


def _lighten(folder: Path) -> None:
    """Leave all of a finished cell but its models."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and path.name in HEAVY:
            shutil.rmtree(path)
        elif path.suffix in HEAVY_FILES:
            path.unlink(missing_ok=True)


def failures(study: Study, root: Path) -> dict[str, str]:
    """Cells that failed when they were run last, and why."""
    found = {}
    for cell in study.runs():
        file = folder_of(root, cell) / "failed.json"
        if file.exists() and missing_rows(file.parent, cell.experiment.rows):
            found[cell.label] = str(read_json(file)["why"])
    return found
