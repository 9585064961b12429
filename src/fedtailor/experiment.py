"""TOML -> Experiment, all errors together; and `run`, the only loop, the same for every engine and every method."""

from __future__ import annotations

import math
import random
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from fedtailor import energy, find, listed, progress, tables, trainers
from fedtailor import evaluate as scoring
from fedtailor.core import Ask
from fedtailor.data import SILO_FIELDS, Data, own_settings
from fedtailor.errors import NoReply, UserError, suggest
from fedtailor.evaluate import Evaluate, Evaluation
from fedtailor.faults import Faults
from fedtailor.files import as_folder
from fedtailor.generations import Best, Generations
from fedtailor.models import Base

Trained = Literal["alone", "centralized", "routed"]
RowName = Literal[
    "zero_shot", "few_shot", "alone", "federated", "centralized", "hand_written", "noiseless", "routed", "untrained"
]  # fmt: skip
Heard = Callable[[Sequence[Mapping[str, Any]]], object]  # is given the log of rounds
ROWS = ("zero_shot", "few_shot", "alone", "federated", "centralized")


@dataclass(frozen=True)
class Engine:
    """The [engine] part: how the silos are run, not what they compute."""

    cohort: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # silos trained in one pass
    threads: Annotated[int, Field(ge=0)] = 0  # 0: all cores; 1 and cohort = 1: bit for bit the same anywhere
    deadline: Annotated[float, Field(gt=0)] = 3600.0  # over a federation: seconds of one exchange, all repeats included
    minimum: Annotated[int, Field(ge=1)] = 1  # over a federation: replies without which a round fails
    patience: Annotated[float, Field(ge=0)] = 120.0  # over a federation: seconds for lost silos, once the rest is in
    record: bool = False  # keep every message of the row federated, but those of its test, under messages/, for audits


@dataclass(frozen=True)
class Experiment:
    """One question: this method, on these silos' rows, beside these baselines."""

    name: str  # of its folder below runs/, too
    data: Data
    method: Any
    model: Base = field(default_factory=Base)
    rounds: Annotated[int, Field(ge=1)] = 4
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the silos drawn each round, at least one
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    rows: tuple[RowName, ...] = ROWS  # type: ignore[assignment]
    evaluate: Evaluation = field(default_factory=Evaluation)
    engine: Engine = field(default_factory=Engine)
    faults: Faults = field(default_factory=Faults)
    silo: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # [silo.NAME]: what one silo does differently
    baseline: Mapping[Trained, Mapping[str, Any]] = field(default_factory=dict)  # [baseline.ROW]: its own [method] settings

    def __post_init__(self) -> None:
        as_folder(self.name)
        for what, given in (("seeds", self.seeds), ("rows", self.rows)):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{what} must be one or more, all different, not {list(given)}")

    def method_of(self, row: str) -> Any:
        """The method as that row trains it: a baseline may have, say, a learning rate that is best for itself."""
        own: Mapping[str, Any] = dict(self.baseline).get(row, {})  # type: ignore[call-overload]
        return TypeAdapter(type(self.method)).validate_python({**asdict(self.method), **own}) if own else self.method


class Running(Protocol):
    """What `run` needs of an engine beside `Ask`."""

    silos: tuple[str, ...]
    rejected: list[tuple[int, str, str]]
    traffic: Any
    waited: float  # in faults.slow's and faults.deadline's time, since this was last taken

    def reach(self, number: int, silos: Sequence[str] | None = None, *, disturbed: bool = True) -> Ask: ...
    def commit(self) -> Mapping[str, dict[str, Any]]: ...  # the memories that a round changed; none where silos keep them
    def restore(self, number: int, memories: Mapping[str, dict[str, Any]]) -> None: ...  # as of the commit of round `number`


@dataclass(frozen=True)
class Report:
    """What a run left: the best state by validation, what it serves, and a log entry per round."""

    state: Any
    served: Any
    best_round: int
    log: list[dict[str, Any]]
    last: Any = None  # the state after the last round


def run(
    experiment: Experiment, engine: Running, keep: Generations | None = None, method: Any = None, seed: int = 0,
    heard: Heard = len,
) -> Report:  # fmt: skip
    """All rounds of one method over one engine. With `keep`, every round is committed there and a killed run goes on.

    `heard` is given the log so far, at the start and after each commit. Silos are sampled once per round from the seed. The
    best round is chosen on validation rows; test is not touched.
    """
    method = experiment.method if method is None else method
    kept = None if keep is None else keep.newest()
    if kept is not None:
        done, state, best, log = kept.round, kept.state, kept.best, kept.log
        engine.restore(done, kept.memories)
    else:
        began = time.perf_counter()
        done, best, state = 0, None, method.begin(engine.reach(0, disturbed=False))
        entry, best = _ended(experiment, engine, method, 0, state, None, began)
        log = [entry]
        _commit(engine, keep, 0, state, best, log)
    heard(log)
    with progress.bar("rounds", experiment.rounds) as advance:
        for _ in range(done):
            advance()
        for number in range(done + 1, experiment.rounds + 1):
            with energy.metered() as spent:
                began = time.perf_counter()
                ask = engine.reach(number, sampled(engine.silos, experiment.participation, seed, number))
                state, lost = _round(experiment, method, state, ask)
            entry, best = _ended(experiment, engine, method, number, state, best, began)
            log.append({**entry, **spent, **({"lost": True} if lost else {}), "silos": list(ask.silos)})
            _commit(engine, keep, number, state, best, log)
            heard(log)
            advance()
            progress.line(_told(log[-1], experiment.rounds))
    chosen, number = (state, experiment.rounds) if best is None else (best.state, best.round)
    return Report(chosen, method.serve(chosen), number, log, state)


def _round(experiment: Experiment, method: Any, state: Any, ask: Ask) -> tuple[Any, bool]:
    """The state after a round, and whether it was lost: where replies are lost at random, by chance all of them may be."""
    try:
        return method.round(state, ask), False
    except NoReply:
        if not 0 < experiment.faults.dropout < 1:
            raise
        return state, True


def sampled(silos: Sequence[str], participation: float, seed: int, number: int) -> tuple[str, ...]:
    """This round's silos, in silo order: the same for the same seed and round, on any engine."""
    count = drawn(len(silos), participation)
    chosen = set(random.Random(f"{seed}/{number}").sample(range(len(silos)), count))
    return tuple(name for i, name in enumerate(silos) if i in chosen)


def drawn(silos: int, participation: float) -> int:
    """How many silos a round draws."""
    return max(1, round(participation * silos))


def _ended(
    experiment: Experiment, engine: Running, method: Any, number: int, state: Any, best: Best | None, began: float
) -> tuple[dict[str, Any], Best | None]:
    """The round's log entry, and the best state with this round in the running."""
    up, down = engine.traffic.take()
    trained = time.perf_counter() - began
    entry: dict[str, Any] = {"round": number, "bytes_up": up, "bytes_down": down, "seconds": trained, "rejected": {}}
    entry |= dict(getattr(state, "notes", {}))
    if engine.waited:
        entry["waited"], engine.waited = engine.waited, 0.0
    if number % experiment.evaluate.every == 0 or number == experiment.rounds:
        name, ask = experiment.evaluate.best_by, engine.reach(number, disturbed=False)
        if hasattr(method, "judge"):  # its questions are those of who asks
            found = method.judge(method.serve(state), ask, "val", False)
        else:
            text = name not in ("loss", "accuracy", "macro_f1")
            body = Evaluate(method.serve(state), "val", experiment.evaluate.max_new_tokens, generate=text)
            found = scoring.summary(scoring.ask_all(ask, body))
        entry["evaluation_bytes_up"], entry["evaluation_bytes_down"] = engine.traffic.take()
        entry["val"] = found
        if name in found:
            now = found[name]["per_silo"]
            if best is None or _improved(name, now, best.per_silo):
                best = Best(number, now, state)
    entry["rejected"] = {silo: why for n, silo, why in engine.rejected if n == number}
    entry["evaluation_seconds"] = time.perf_counter() - began - trained
    return entry, best


def _improved(name: str, now: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Over the silos that both rounds heard of: another set of silos would be another mean."""
    shared = now.keys() & before.keys()
    means = [math.fsum(values[silo] for silo in shared) for values in (now, before)]
    return bool(shared) and scoring.better(name, *means)


def _commit(
    engine: Running, keep: Generations | None, number: int, state: Any, best: Best | None, log: list[dict[str, Any]]
) -> None:
    memories = engine.commit()
    if keep is not None:
        keep.commit(number, state, memories, best, log)


def _told(entry: Mapping[str, Any], rounds: int) -> str:
    parts = [f"round {entry['round']} of {rounds}"]
    if "train_loss" in entry:
        parts.append(f"train loss {entry['train_loss']:.3f}")
    parts += [f"val {name} {found['mean']:.3f}" for name, found in entry.get("val", {}).items()]
    return ", ".join(parts) + f" ({entry['seconds'] + entry['evaluation_seconds']:.0f} s)"


def read(path: Path) -> dict[str, Any]:
    """The table of a TOML file. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; shipped experiments are in experiments/") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error


def load(path: Path, sets: Sequence[str] = (), seed: int | None = None) -> Experiment:
    """The experiment of a file, with `--set part.key=value` laid over it. Raises UserError listing *all* its errors."""
    table = read(path)
    table.setdefault("name", path.stem)
    table.pop("command", None)  # a run's own experiment.toml says how it was started
    written = dict(table["method"]) if isinstance(table.get("method"), dict) else {}
    for text in sets:
        set_over(table, text)
    other_method(table, written, {text.partition("=")[0].strip() for text in sets})
    if seed is not None:
        table["seeds"] = [seed]
    return parse(resolved(table, path.parent), str(path))


def resolved(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The table with the files that it names, relative to here or to `folder`, found or read. In place."""
    settings = table.get("method")
    if isinstance(settings, dict) and settings.get("name") in find.methods():
        listed.inlined(settings, getattr(find.method(settings["name"]), "FILES", ()), folder)
    listed.found(table, folder)
    return table


def parse(table: Mapping[str, Any], place: str) -> Experiment:
    """A dict as read from TOML -> Experiment. `place` begins every error line. Raises UserError with one line per error."""
    errors: list[str] = []
    parts: dict[str, Any] = {}
    known = {"model": Base, "data": Data, "evaluate": Evaluation, "engine": Engine, "faults": Faults}
    rest = {key: value for key, value in table.items() if key not in (*known, "method")}
    for part, kind in known.items():
        if part in table or part == "data":
            parts[part] = tables.part(kind, table.get(part, {}), f"{place}: [{part}]", errors)
    trainers.allow({key: table.get(key) for key in ("method", "silo", "baseline")})
    parts["method"] = _method(table.get("method"), place, errors)
    if "silo" in rest:
        _silos(rest["silo"], parts["data"], parts["method"], place, errors)
    if parts["method"] is not None and isinstance(rest.get("baseline"), Mapping):
        for row, settings in rest["baseline"].items():
            if isinstance(settings, Mapping):  # else told by the schema
                kind = type(parts["method"])
                tables.part(kind, {**asdict(parts["method"]), **settings}, f"{place}: [baseline.{row}]", errors)
    top = {f.name for f in fields(Experiment)}
    for key in [key for key in rest if key not in top]:
        errors.append(f"{place}: no setting {key!r} at the top{suggest(key, top)}")
        del rest[key]
    stand_ins = {
        **parts,
        "method": parts["method"] or "x",
        "data": parts["data"] or Data(source="x", template="{x}", answer="x", silo_column="x"),
    }
    found = tables.part(Experiment, {**rest, **{k: v for k, v in stand_ins.items() if v is not None}}, f"{place}:", errors)
    if errors:
        raise UserError("\n".join(errors))
    return found  # type: ignore[no-any-return]


def as_table(experiment: Experiment) -> dict[str, Any]:
    """The experiment as TOML would hold it, every setting written out: `parse` gives it back."""
    table: dict[str, Any] = _plain(asdict(experiment))
    table["method"] = {"name": name_of(type(experiment.method)), **table["method"]}
    return table


def name_of(method: type[Any]) -> str:
    """The name that `find.method` takes."""
    ours = "fedtailor.methods."
    return (
        method.__module__.removeprefix(ours)
        if method.__module__.startswith(ours)
        else f"{method.__module__}:{method.__name__}"
    )


def _plain(value: Any) -> Any:
    """Without what TOML cannot hold: None is left out, tuples are lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _method(table: Any, place: str, errors: list[str]) -> Any:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        errors.append(f"{place}: [method] needs a name{suggest('', find.methods())}")
        return None
    try:
        kind = find.method(table["name"])
    except UserError as error:
        errors.append(f"{place}: {error}")
        return None
    settings = {k: v for k, v in table.items() if k != "name"}
    method = tables.part(kind, settings, f"{place}: [method]", errors)
    if method is not None and hasattr(method, "aggregate"):
        from fedtailor import aggregate

        try:
            aggregate.find(method.aggregate)
        except UserError as error:
            errors.append(f"{place}: {error}")
    return method


def _silos(table: Any, data: Data | None, method: Any, place: str, errors: list[str]) -> None:
    """[silo.NAME] tables: data settings, or those method settings that one silo may have for itself."""
    from fedtailor.methods.averaging import per_silo
    from fedtailor.methods.scaffold import UNEQUAL

    own = per_silo(type(method)) if method is not None else frozenset()
    for name, settings in table.items() if isinstance(table, Mapping) else ():
        if not isinstance(settings, dict):
            continue  # told by the schema
        where = f"{place}: [silo.{name}]"
        for key in [k for k in settings if k not in SILO_FIELDS | own]:
            if method is not None:
                errors.append(f"{where} has no setting {key!r}{suggest(key, SILO_FIELDS | own)}")
        about_rows = {k: v for k, v in settings.items() if k in SILO_FIELDS}
        if data is not None and about_rows:
            tables.part(Data, own_settings(data, about_rows), where, errors)
        mine = {k: v for k, v in settings.items() if k in own}
        if method is not None and mine:
            checked = tables.part(type(method), {**asdict(method), **mine}, where, errors)
            settings.update({k: getattr(checked, k) for k in mine if checked is not None})  # 2, where "2" was written
            for key in sorted({"rank", "virtual_tokens"} & set(mine)):
                if isinstance(mine[key], int) and mine[key] > getattr(method, key):
                    errors.append(
                        f"{where} {key} = {mine[key]} is above [method] {key} = {getattr(method, key)}: raise that one"
                    )
                elif getattr(method, "scaffold", False) and isinstance(mine[key], int) and mine[key] < getattr(method, key):
                    errors.append(f"{where} {key} = {mine[key]} {UNEQUAL}")


def other_method(table: dict[str, Any], written: Mapping[str, Any], sets: set[str]) -> None:
    """`--set method.name=...`: what the file says of its own method is left out where the new one lacks it, and its lr. So in
    [method], in [baseline.ROW] and in [silo.NAME]."""
    from fedtailor.methods.averaging import per_silo

    now = table.get("method")
    if not isinstance(now, dict) or "name" not in written or now.get("name") == written["name"]:
        return
    try:
        old, new = find.method(str(written["name"])), find.method(str(now.get("name")))
    except UserError:
        return  # told by parse
    known = {f.name for f in fields(new)}
    gone = {key for key in ({f.name for f in fields(old)} | set(written)) - {"name"} if key == "lr" or key not in known}
    for place, settings, mine in [
        ("method", now, gone),
        *((f"baseline.{row}", one, gone) for row, one in _tables(table, "baseline")),
        *((f"silo.{silo}", one, (per_silo(old) - per_silo(new)) | {"lr"}) for silo, one in _tables(table, "silo")),
    ]:
        for key in [k for k in settings if k in mine and not _asked(f"{place}.{k}.", sets)]:
            del settings[key]


def _asked(place: str, sets: set[str]) -> bool:
    """Whether this was set, or a part of it, or what it is a part of."""
    return any(f"{one}.".startswith(place) or place.startswith(f"{one}.") for one in sets)


def _tables(table: Mapping[str, Any], part: str) -> list[tuple[str, dict[str, Any]]]:
    found = table.get(part)
    return [(name, one) for name, one in found.items() if isinstance(one, dict)] if isinstance(found, dict) else []


def set_over(table: dict[str, Any], text: str) -> None:
    """`part.key=value` laid over the table; the value as TOML, or as plain text where it is not TOML."""
    place, equals, value = text.partition("=")
    if not equals or not place.strip():
        raise UserError(f"--set {text}: write part.key=value, such as method.lr=0.01")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    tables.put(table, place.strip(), parsed, f"--set {text}")
