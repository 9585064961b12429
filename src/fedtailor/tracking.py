"""Rounds as they happen to an experiment tracker: `to` says which, `row` is one trained row. Nothing by default.

Figures and settings go, once each: means, sums, bytes, seconds. No row, no sample, no text of a prompt, no absolute path. A
tracker that fails never ends a run: one line says so, and tracking stops.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedtailor import find, progress, trackers
from fedtailor.errors import UserError, printable
from fedtailor.experiment import Experiment, as_table
from fedtailor.figures import COSTS, is_number
from fedtailor.files import read_json, write_json

Figures = Mapping[str, float]
FILE = "tracked.json"  # in a row's folder: by tracker, the run's id there and how many rounds it was told


@dataclass(frozen=True)
class Tracked:
    """One trained row, as a tracker is told of it when it begins or goes on."""

    id: str  # letters and digits; the same when the row goes on in another process
    name: str  # folder/row/seed-n, with the silo after row `alone`
    group: str  # the experiment's name
    config: Mapping[str, str | float]  # settings, by their path: method.lr
    rounds: int
    folder: Path  # the row's own, for a tracker that writes files


class Tracker(Protocol):
    """What came of a begun run. "package.module:Class" of a user's: Class(tracked) gives one; any exception stops tracking."""

    def log(self, number: int, figures: Figures) -> Any:
        """After round `number`: what goes into rounds.jsonl, numbers alone; the means over silos are `val/accuracy` and so on."""

    def end(self, figures: Figures | None) -> Any:
        """The last call: `test/accuracy`, `test/worst/accuracy`, `cost/seconds` and so on; None where the row was cut off."""


Begin = Callable[[Tracked], Tracker]
_by: tuple[str, Begin] | None = None


def to(name: str | None) -> None:
    """From here on, all rows that this process trains are told to the tracker of that name, or of "package.module:Class"; None:
    to none. Raises UserError: an unknown name, or a library that is not installed."""
    global _by
    _by = None if name is None else (name, _found(name))


def _found(name: str) -> Begin:
    known = find.functions(trackers)
    found: Begin = find.function(trackers.__name__, name, "--track", known, "tracker")
    if name in known:
        try:
            library = importlib.import_module(name)
        except ModuleNotFoundError as error:
            library = None
            if (error.name or "").partition(".")[0] != name:
                raise UserError(f"--track {name}: {name} lacks {error.name}; next: pip install '{_extra(name)}'") from error
        if getattr(library, "__file__", None) is None:  # a folder of its name, as trackers leave some, is no library
            raise UserError(f"--track {name} needs {_extra(name)}: pip install '{_extra(name)}'")
    return found


def _extra(name: str) -> str:
    return f"fedtailor[{name}]"


class Row:
    """One row's way to the tracker."""

    def __init__(self, tracked: Callable[[str], Tracked], folder: Path) -> None:
        self.file, self.told = folder / FILE, 0
        self.tracker: Tracker | None = None
        if _by is not None:
            self.by, begin = _by
            with self._or_stop():
                known = self._known().get(self.by) or {"id": secrets.token_hex(6), "rounds": 0}
                self.id, self.told = known["id"], known["rounds"]
                self.tracker = begin(tracked(self.id))

    def rounds(self, log: Sequence[Mapping[str, Any]]) -> None:
        """The log so far: what was not told yet is told now, so also the rounds before --track was first given."""
        for entry in log[self.told :]:
            if self.tracker is None:
                return
            with self._or_stop():
                self.told += 1  # noted before: a round is rather lost to a kill between the two than told twice
                write_json(self.file, {**self._known(), self.by: {"id": self.id, "rounds": self.told}})
                self.tracker.log(entry["round"], of_round(entry))

    def end(self, found: Mapping[str, Any] | None) -> None:
        """The row's result; None, where there is none."""
        one, self.tracker = self.tracker, None
        if one is not None:
            with self._or_stop():
                one.end(None if found is None else of_row(found))

    def _known(self) -> dict[str, Any]:
        return dict(read_json(self.file)) if self.file.exists() else {}

    @contextlib.contextmanager
    def _or_stop(self) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the result's table stands there alone
                yield
        except Exception as error:
            self.tracker = None
            to(None)
            why = printable(str(error).strip().partition("\n")[0]) or "no reason given"
            progress.aloud(f"tracking stops here, the run goes on: {self.by}: {type(error).__name__}: {why}")


@contextlib.contextmanager
def row(experiment: Experiment, method: Any, base: Path, folder: Path, seed: int) -> Iterator[Row]:
    """`with row(...) as told`: then told.rounds(log) after each round, and told.end(result). `base`: the folder of that seed's
    rows, `folder`: the row's, below it."""

    def tracked(id: str) -> Tracked:
        row = folder.relative_to(base / "rows").as_posix()
        config = settings(replace(experiment, method=method)) | {"row": row, "seed": seed}
        run = base.resolve() if len(experiment.seeds) == 1 else base.resolve().parent
        return Tracked(id, f"{run.name}/{row}/seed-{seed}", experiment.name, config, experiment.rounds, folder)

    one = Row(tracked, folder)
    try:
        yield one
    finally:
        one.end(None)


def of_round(entry: Mapping[str, Any]) -> dict[str, float]:
    """A round's log entry -> its numbers."""
    found = {key: value for key, value in entry.items() if is_number(value) and key != "round"}
    found |= {f"val/{name}": one["mean"] for name, one in entry.get("val", {}).items() if is_number(one["mean"])}
    counts = {key: len(entry[key]) for key in ("silos", "rejected") if key in entry}  # never who, nor why
    return found | counts


def of_row(result: Mapping[str, Any]) -> dict[str, float]:
    """A row's result -> its numbers: means over silos, the worst silo, costs."""
    found: dict[str, float] = {}
    for place, part in (("test", result), ("test/own", result.get("own") or {})):
        for name, one in part.items():
            if isinstance(one, Mapping) and is_number(one.get("mean")):
                found |= {f"{place}/{name}": one["mean"], f"{place}/worst/{name}": one["worst"]}
    return found | {f"cost/{name}": result[name] for name in COSTS if is_number(result.get(name))}


def settings(experiment: Experiment) -> dict[str, str | float]:
    """All settings, by their path. Not those that hold texts (prompts, examples); of an absolute path the last part."""
    table = as_table(experiment)
    table.pop("baseline", None)  # of other rows
    for name in getattr(experiment.method, "FILES", ()):
        table["method"].pop(name, None)
    return {place: one for place, one in _flat("", table) if one != ""}  # what is not set says nothing


def _flat(place: str, value: Any) -> Iterator[tuple[str, str | float]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(f"{place}.{key}" if place else str(key), one)
    elif isinstance(value, list):
        yield place, ", ".join(str(_short(one)) for one in value)
    else:
        yield place, _short(value)


def _short(value: Any) -> str | float:
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value if isinstance(value, bool | int | float) else str(value)
