"""TOML -> Study -> cells. A study is a base experiment and parts; each part lays the values of its axes over the base.

    seeds = [0, 1, 2]
    [base]                                   # an experiment, as `fedtailor run` takes it; or base = "FILE.toml"
    [choice.method.lora]                     # what the value "lora" of the axis "method" lays over it
    "method.name" = "lora"
    [choice.rows_of.natural]
    remove = ["data.silos"]                  # settings of the base that it is without
    "data.silo_column" = "hospital"
    [[part]]
    name = "skew"
    axes = { method = ["prefix", "lora"], alpha = [0.1, 1, 100] }     # all combinations
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedtailor import experiment as experiments
from fedtailor import tables
from fedtailor.errors import UserError, suggest
from fedtailor.experiment import Experiment, RowName
from fedtailor.faults import Faults
from fedtailor.figures import METRICS
from fedtailor.files import as_folder

Value = str | float | int
At = Mapping[str, Value]  # axis -> value: a point of a part's grid
Overlay = Mapping[str, Any]  # dotted path of a setting -> its value
Asks = Literal["performance", "efficiency", "robustness"]

# Axes that need no [choice]: their values are those of one setting. Any dotted path is an axis, too.
SETTINGS = {
    "method": "method.name", "aggregate": "method.aggregate", "partition": "data.partition", "alpha": "data.alpha",
    "silos": "data.silos", "labels per silo": "data.labels_per_silo", "label noise": "data.label_noise",
    "participation": "participation", "rounds": "rounds", "dropout": "faults.dropout", "noise": "faults.noise",
    "attackers": "faults.attackers", "attack": "faults.attack", "stragglers": "faults.slow", "model": "model.name",
}  # fmt: skip
REMOVE = "remove"  # in a choice, or in a part's set: settings of the base that are to be as if they had not been written
NOT_CONTENT = ("name", "rows")  # of an experiment: neither changes a number of a row
KEYS = 1  # counted up when a default changes: what was run before it is something else


@dataclass(frozen=True)
class Part:
    """One question of a study: which experiments, and how their figures are compared."""

    name: str
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    title: str = ""
    asks: Asks = "robustness"
    about: str = ""  # a sentence or two for the report
    set: Mapping[str, Any] = field(default_factory=dict)  # over the base, for all of this part
    base: str = ""  # another experiment file than the study's own [base]
    choice: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)  # before the study's own
    rows: tuple[RowName, ...] = ("federated",)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()  # none: the study's
    along: str = ""  # the axis that plots run along; by default the last
    reference: Value | None = None  # the value of `along` that the others are compared with; by default its first
    metric: str = ""  # by default what the figures have: accuracy, recall_at_5, rouge_l or loss
    over: Literal["rows", "silos"] = "rows"  # of all test rows together, or the unweighted mean over silos
    skip: tuple[Mapping[str, Value], ...] = ()  # combinations that are left out

    def __post_init__(self) -> None:
        if self.metric and self.metric not in METRICS:
            raise ValueError(f"metric: no metric {self.metric!r}{suggest(self.metric, METRICS)}")
        for left in self.skip:
            if not left or any(value not in self.axes.get(axis, ()) for axis, value in left.items()):
                raise ValueError(f"skip: {dict(left)} is no combination of the axes and their values")
        if not self.name or not set(self.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
            raise ValueError(f"name {self.name!r} must be of small letters, digits, - and _: files are called after it")
        for axis, values in self.axes.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"axes {axis!r}: one or more values, all different, not {list(values)}")
        if self.along and self.along not in self.axes:
            raise ValueError(f"along: no axis {self.along!r}{suggest(self.along, self.axes)}")
        if self.reference is not None and self.reference not in self.axes.get(self.line, ()):
            raise ValueError(f"reference: {self.reference!r} is no value of the axis {self.line!r}")

    @property
    def line(self) -> str:
        """The axis that plots run along; "" without axes."""
        return self.along or next(iter([*self.axes][::-1]), "")

    @property
    def against(self) -> Value | None:
        """The value of that axis which the others are compared with."""
        values = self.axes.get(self.line, ())
        return self.reference if self.reference is not None else next(iter(values), None)


def named(at: At) -> str:
    """method lora, alpha 0.1"""
    return ", ".join(f"{axis} {shown(value)}" for axis, value in at.items())


def shown(value: Any) -> str:
    """An axis' value wherever it is read: 0.3, 100, 1.23456 as they are; of 1 / 7, which has no end, 0.143."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value or abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Cell:
    """One experiment and one seed, as a part asks for it. Parts may share the folder that it is run in."""

    part: Part
    at: At
    seed: int
    experiment: Experiment
    key: str  # of its content: the folder's name

    @property
    def label(self) -> str:
        return f"{self.part.name}{f' ({named(self.at)})' if self.at else ''}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    name: str
    parts: tuple[Part, ...]
    cells: tuple[Cell, ...]
    title: str = ""
    about: str = ""
    margin: float = 0.02  # "close to": at most so much worse, in the metric's own unit
    target: float = 0.95  # bytes and seconds are told until this share of the best quality is reached
    keep: Literal["figures", "models"] = "figures"  # models: each cell keeps its adapters, too
    source: Mapping[str, Any] = field(default_factory=dict)  # the file, with the base in it

    def runs(self) -> list[Cell]:
        """Each folder once, with all rows that any part asks of it, in the order of the parts."""
        found: dict[str, Cell] = {}
        for cell in self.cells:
            rows = [*(found[cell.key].experiment.rows if cell.key in found else ()), *cell.part.rows]
            ordered = tuple(dict.fromkeys([*(row for row in experiments.ROWS if row in rows), *rows]))
            found[cell.key] = replace(found.get(cell.key, cell), experiment=replace(cell.experiment, rows=ordered))
        return list(found.values())


@dataclass(frozen=True)
class _Head:
    """A study's file but for its base."""

    part: tuple[Part, ...]
    name: str = "study"
    title: str = ""
    about: str = ""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    margin: Annotated[float, Field(ge=0)] = 0.02
    target: Annotated[float, Field(gt=0, le=1)] = 0.95
    keep: Literal["figures", "models"] = "figures"
    choice: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.part or not self.seeds:
            raise ValueError("a study needs one [[part]] and one of seeds at least")
        as_folder(self.name)
        used = {(axis, str(value)) for part in self.part for axis, values in part.axes.items() for value in values}
        for axis, named in self.choice.items():
            for value in named:
                if (axis, value) not in used:
                    axes = {axis for axis, _ in used}
                    raise ValueError(f"choice.{axis}.{value}: no part has an axis {axis!r} with it{suggest(axis, axes)}")


def is_study(table: Mapping[str, Any]) -> bool:
    return "part" in table


def load(path: Path, sets: Sequence[str] = ()) -> Study:
    """The study of a file, with `--set base.part.key=value` laid over it. Raises UserError listing *all* its errors."""
    table = experiments.read(path)
    for text in sets:
        experiments.set_over(table, text)
    table.setdefault("name", path.stem)
    return parse(table, str(path), path.parent)


def same(path: Path, study: Study) -> bool:
    """Whether that file says this study."""
    try:
        table = experiments.read(path)
        table.setdefault("name", path.stem)
        return _whole(table, str(path), path.parent) == study.source
    except (UserError, KeyError, AttributeError, TypeError):  # of someone who is in the middle of writing it
        return False


def parse(table: Mapping[str, Any], place: str, folder: Path = Path()) -> Study:
    """A dict as read from TOML -> Study with all its cells. Paths in it are relative to here or to `folder`."""
    errors: list[str] = []
    if not is_study(table):
        raise UserError(f"{place}: no [[part]], so it is no study; an experiment is run with `fedtailor run {place}`")
    head = {key: value for key, value in table.items() if key != "base"}
    for number, one in enumerate(head["part"] if isinstance(head["part"], list) else ()):
        where = one.get("name", number + 1) if isinstance(one, dict) else number + 1
        tables.part(Part, one, f"{place}: [[part]] {where}", errors)
    found = tables.part(_Head, head, f"{place}:", errors) if not errors else None
    if errors or found is None:
        raise UserError("\n".join(errors))
    names = [part.name for part in found.part]
    errors += [f"{place}: two parts are named {name!r}" for name in {n for n in names if names.count(n) > 1}]
    cells: list[Cell] = []
    for part in found.part:
        cells += _cells(part, found, table.get("base"), place, folder, errors)
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    whole = _whole(table, place, folder)
    return Study(
        found.name, found.part, tuple(cells), found.title, found.about, found.margin, found.target, found.keep, whole
    )


def _whole(table: Mapping[str, Any], place: str, folder: Path) -> dict[str, Any]:
    """The study without need of the files that its bases are in, but for those that only one part has."""
    parts = [{**one, **({"base": str(_file(one["base"], folder).resolve())} if one.get("base") else {})} for one in table["part"]]
    return {**table, **({"base": _base(table["base"], place, folder)} if "base" in table else {}), "part": parts}


def _cells(part: Part, head: _Head, base: Any, place: str, folder: Path, errors: list[str]) -> Iterator[Cell]:
    where = f"{place}: [[part]] {part.name}"
    try:
        start = _base(part.base or base, place, folder)
        known = {**head.choice, **part.choice}
        overlays = {axis: {value: _overlay(axis, value, known) for value in values} for axis, values in part.axes.items()}
        _apart(overlays)
    except UserError as error:
        errors.append(f"{where}: {error}")
        return
    for values in itertools.product(*part.axes.values()):
        at = dict(zip(part.axes, values, strict=True))
        if any(all(at.get(axis) == value for axis, value in left.items()) for left in part.skip):
            continue
        laid: dict[str, Any] = {}
        for overlay in (flat(part.set), *(overlays[axis][value] for axis, value in at.items())):
            laid |= {**overlay, REMOVE: [*laid.get(REMOVE, ()), *overlay.get(REMOVE, ())]}
        told = named(at)
        try:
            one = experiments.parse(_laid(start, laid, folder), f"{where}{f' ({told})' if told else ''}")
        except UserError as error:
            errors += str(error).splitlines()
            continue
        for seed in part.seeds or head.seeds:
            mine = replace(one, seeds=(seed,), rows=part.rows, name=head.name)
            yield Cell(part, at, seed, mine, key_of(mine))


def key_of(experiment: Experiment) -> str:
    """Of what an experiment computes, whatever it and its rows are called, and wherever the file of its data lies.

    Settings at their defaults are left out, so that a setting more in a later version does not make all runs anew.
    """
    idle = not experiment.faults.attackers and experiment.faults.attack != "backdoor"  # of which success is counted anyway
    faults = replace(experiment.faults, attack=Faults.attack, strength=Faults.strength) if idle else experiment.faults
    said = {k: v for k, v in _said(replace(experiment, faults=faults)).items() if k not in NOT_CONTENT}
    for name in ("source", "public"):
        if (given := Path(said["data"].get(name, ""))).is_absolute() and given.exists():
            said["data"][name] = sha256_of(given)
    content = {"method": experiments.name_of(type(experiment.method)), "settings": said, "keys": KEYS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Of a file's content, or of all files' in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256("".join(_hashed(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files).encode()).hexdigest()


@functools.cache
def _hashed(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(value: Any) -> Any:
    """What a dataclass holds beside its defaults, all the way down."""
    if is_dataclass(value):
        held = {item.name: (getattr(value, item.name), _default(item)) for item in fields(value)}
        return {name: _said(now) for name, (now, default) in held.items() if now != default}
    if isinstance(value, Mapping):
        return {key: _said(one) for key, one in value.items()}
    return [_said(one) for one in value] if isinstance(value, list | tuple) else value


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as dotted paths; a key may be a path already."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else {f"{before}{key}": value}
    return found


def _base(given: Any, place: str, folder: Path) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    if not isinstance(given, str):
        raise UserError("no [base]: write an experiment there, or base = \"FILE.toml\"")
    path = _file(given, folder)
    return experiments.resolved(experiments.read(path), path.parent)


def _file(given: str, folder: Path) -> Path:
    path = next((p for p in (folder / given, Path(given)) if p.is_file()), None)
    if path is None:
        raise UserError(f"base = {given!r}: no such file, seen from {folder.resolve().name}/")
    return path


def _overlay(axis: str, value: Value, choices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Overlay:
    named = choices.get(axis, {})
    if str(value) in named:
        return flat(named[str(value)])
    if axis in SETTINGS or "." in axis:
        return {SETTINGS.get(axis, axis): value}
    if named:
        raise UserError(f"axes: no [choice.{axis}.{value}]{suggest(str(value), named)}")
    raise UserError(f"axes: no axis {axis!r}{suggest(axis, SETTINGS)}; or a setting's path, or write [choice.{axis}.NAME]")


def _apart(overlays: Mapping[str, Mapping[Value, Overlay]]) -> None:
    """No two axes set the same: the one would undo the other. Raises UserError."""
    taken: dict[str, str] = {}
    for axis, values in overlays.items():
        for path in {path for overlay in values.values() for path in overlay} - {REMOVE}:
            if path in taken:
                raise UserError(f"axes: {taken[path]!r} and {axis!r} both set {path}; the one would undo the other")
            taken[path] = axis


def _laid(start: Mapping[str, Any], laid: Overlay, folder: Path) -> dict[str, Any]:
    """The base with these settings over it, and without those to remove. Another method leaves out what is of the base's own."""
    table = copy.deepcopy(dict(start))
    written = dict(table["method"]) if isinstance(table.get("method"), dict) else {}
    for path in laid.get(REMOVE, ()):
        *parts, key = path.split(".")
        inside: Any = table
        for part in parts:
            inside = inside.get(part) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or key not in inside:
            raise UserError(f"remove: the base has no setting {path!r}")
        del inside[key]
    for path, value in laid.items():
        if path != REMOVE:
            tables.put(table, path, copy.deepcopy(value))
    table.pop("name", None)
    table.pop("seeds", None)
    table.pop("rows", None)
    experiments.other_method(table, written, set(laid))
    return {"name": "study", **experiments.resolved(table, folder)}

