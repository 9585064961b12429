"""A run's folder: every row of an experiment, one after the other, resumable at any moment, ending in result.json.

    runs/<name>/  experiment.toml  plan.json  result.json  rounds.jsonl  report.html  adapter/
                  rows/<row>/[<silo>/]  row.json  rounds.jsonl  state/
With several seeds, seed-<n>/ holds each seed's rows, and result.json their means. docs: DESIGN.md, "result.json".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedtailor import __version__, models, wire
from fedtailor import data as rows_of
from fedtailor.engines import courier, standing
from fedtailor.engines.courier import Courier
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment, as_table, load, parse
from fedtailor.files import held, read_json, write_json
from fedtailor.merging import merge
from fedtailor.preparing import prepare
from fedtailor.report import VERSION
from fedtailor.seeds import Seed

HERE = ("few_shot", "alone", "centralized", "noiseless")  # rows that pool what silos hold, or leave off the noise that hides it


@dataclass
class Run:
    """One experiment in one folder, one seed at a time."""

    experiment: Experiment
    folder: Path
    command: str = ""
    prepared: tuple[rows_of.Loaded, models.Resident] | None = None  # the first seed's rows, and the base
    plan: dict[str, Any] = field(default_factory=dict)  # threads and cohort sizes, fixed before the first step
    content: str = ""  # what must stay the same until it is finished; by default all of the experiment
    others: Mapping[str, Sequence[Path]] = field(default_factory=dict)  # zero_shot, few_shot -> runs that may have the same one
    courier: Courier | None = None  # to silos in processes of their own; None: all silos are in this one

    def conduct(self) -> dict[str, Any]:
        """All rows of all seeds; what is finished already is not done again. Returns, and writes, the result."""
        with locked(self.folder):
            self._settle_plan()
            self._same("experiment", "experiment.toml", self.content or _digest(self.experiment))
            first, resident = self.prepared or prepare(self.experiment, self.afar)
            self._same("model", "the base model or its dtype", resident.sha256)
            seeds, results = self.experiment.seeds, {}
            environment: dict[str, Any] = {}
            for seed in seeds:
                again = seed != seeds[0] and not self.afar
                loaded = rows_of.load(self.experiment.data, self.experiment.silo, seed) if again else first
                self._same_data(seed, loaded.sha256)
                here = self.folder if len(seeds) == 1 else self.folder / f"seed-{seed}"
                before = [self.folder / f"seed-{s}" for s in seeds[: seeds.index(seed)]]
                one = Seed(self, seed, here, resident, loaded.silos, before, loaded.public)
                results[seed] = one.conduct()
                environment = self._environment(resident, loaded.sha256)
                if len(seeds) > 1:
                    write_json(here / "result.json", self._result(environment, [seed], results[seed]))
            merged = results[seeds[0]] if len(seeds) == 1 else merge(results)
            result = self._result({**environment, "plan": self.plan}, list(seeds), merged)
            write_json(self.folder / "result.json", result)
            return result

    @property
    def afar(self) -> tuple[str, ...]:
        return () if self.courier is None else self.courier.silos

    @property
    def rows(self) -> list[str]:
        """The rows that can be had: over a federation none of those that are for one process alone."""
        return [row for row in self.experiment.rows if not self.courier or row not in HERE]

    @property
    def model_sha256(self) -> str:
        """Of the base, as far as it is known before `conduct`."""
        file = self.folder / "plan.json"
        plan = read_json(file) if file.exists() else {}
        return self.prepared[1].sha256 if self.prepared else str(plan.get("sha256", {}).get("model", ""))

    def planned(self, plan: Mapping[str, int]) -> None:
        self.plan["cohort"] = dict(plan)
        write_json(self.folder / "plan.json", self.plan)

    def _settle_plan(self) -> None:
        file = self.folder / "plan.json"
        if file.exists():
            self.plan = read_json(file)
            if ("run" in self.plan) != (self.courier is not None):
                how = "over a federation: add --federation" if "run" in self.plan else "in one process: leave --federation out"
                raise UserError(f"{self.folder}: this run began {how}")
        else:
            self.plan = {"threads": self.experiment.engine.threads or torch.get_num_threads(), "cohort": {}}
            if self.courier is not None:
                self.plan["run"] = secrets.token_hex(8)  # silos keep memories by it: another run never finds them
            write_json(file, self.plan)
        torch.set_num_threads(int(self.plan["threads"]))

    def _same_data(self, seed: int, sha256: str) -> None:
        """Raises UserError when the rows are not those that the run began with."""
        self._same(f"data of seed {seed}", "the data", sha256)

    def _same(self, key: str, what: str, sha256: str) -> None:
        known = self.plan.setdefault("sha256", {})
        if known.get(key, sha256) != sha256:
            raise UserError(f"{self.folder}: {what} changed since this run began; bring it back, or start a new run")
        if key not in known:
            known[key] = sha256
            write_json(self.folder / "plan.json", self.plan)

    def _environment(self, resident: models.Resident, data_sha256: str) -> dict[str, Any]:
        cohort = self.experiment.engine.cohort
        alone = getattr(self.experiment.method, "one_by_one", "")
        if hasattr(self.experiment.method, "alone_on"):
            alone = self.experiment.method.alone_on(resident)
        if resident.quantized:
            alone = "torch.func.vmap has no rule for quantized weights"
        return {
            "fedtailor": __version__, **models.versions(), "python": platform.python_version(), "system": platform.system(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
            "dtype": str(resident.module.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "cohort": max([1, *self.plan["cohort"].values()]) if cohort == "auto" or alone else cohort,
            **({"cohort_note": f"silos trained one by one: {alone}"} if alone else {}),
            "model": resident.source if resident.source == "tiny" else self.experiment.model.name,
            "model_kind": resident.kind, "model_sha256": resident.sha256, "data_sha256": data_sha256,
        }  # fmt: skip

    def _result(self, environment: Mapping[str, Any], seeds: list[int], rows: Mapping[str, Any]) -> dict[str, Any]:
        experiment = as_table(self.experiment)
        for part, key in (("data", "source"), ("data", "public"), ("model", "name"), ("method", "secrets")):
            if Path(experiment[part].get(key, "")).is_absolute():  # results are passed on: they need not say where things lie
                experiment[part][key] = Path(experiment[part][key]).name
        return {
            "version": VERSION, "name": self.experiment.name, "experiment": experiment, "seeds": seeds,
            "environment": dict(environment), "command": self.command, "rows": dict(rows),
        }  # fmt: skip


def begin(experiment: Experiment, out: Path | None, command: str, courier: Courier | None = None) -> Run:
    """A new run in `out`, or in runs/<name>, or, where that is taken, in runs/<name>-2 and so on: nothing is overwritten."""
    import tomli_w

    text = tomli_w.dumps({**as_table(experiment), "command": command})
    folder = out or Path("runs") / experiment.name
    number = 2
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another with --out")
    while (made := _reserved(folder)) is None:
        if out is not None:
            raise UserError(f"--out {out}: not empty; choose another, or go on with `fedtailor run --resume {out}`")
        folder = Path("runs") / f"{experiment.name}-{number}"
        number += 1
    try:
        wire.write_bytes(folder / "experiment.toml", text.encode())
        one = Run(experiment, folder, command, courier=courier)
        one.prepared = prepare(experiment, one.afar)
        return one
    except BaseException:  # what cannot run leaves no folder behind
        for name in ("experiment.toml", ".lock"):
            (folder / name).unlink(missing_ok=True)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def _digest(experiment: Experiment) -> str:
    return hashlib.sha256(json.dumps(as_table(experiment), sort_keys=True).encode()).hexdigest()


def _reserved(folder: Path) -> list[Path] | None:
    """Take an empty or new folder by its lock file, so that two starts at once never share one. Returns the folders
    made for it, the innermost first; None when it is taken."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return None
    try:
        (folder / ".lock").touch(exist_ok=False)
    except FileExistsError:
        return None
    return missing


def start(
    file: Path | None, resumed: Path | None, sets: Sequence[str], seed: int | None, out: Path | None, command: str,
    courier: Courier | None = None,
) -> Run:  # fmt: skip
    """What `fedtailor run` is asked for: a new run of `file`, or the one in folder `resumed`, to go on."""
    if file is None and resumed is None:
        raise UserError("name an experiment file, or --resume FOLDER")
    if resumed is not None and (out is not None or (file is None and (sets or seed is not None))):
        raise UserError("--set, --seed and --out do not go with --resume: a run goes on as it was begun")
    asked = None if file is None else load(file, sets, seed)
    if resumed is not None:
        return resume(resumed, asked, courier)
    assert asked is not None
    return begin(asked, out, command, courier)


@contextlib.contextmanager
def over(
    federation: Path | None, file: Path | None, resumed: Path | None, sets: Sequence[str], seed: int | None, out: Path | None,
    command: str,
) -> Iterator[Run]:  # fmt: skip
    """As `start`; `federation`: a server's kit, whose courier is held meanwhile, and which the run's standing is kept in."""
    if federation is None:
        yield start(file, resumed, sets, seed, out, command)
        return
    kit = federation if federation.is_dir() else federation.parent
    with courier.of(federation) as reached:
        one = start(file, resumed, sets, seed, out, command, reached)
        folder, rounds = str(one.folder.resolve()), one.experiment.rounds
        with standing.Noted(reached, kit, folder, rounds, one.model_sha256) as one.courier:
            yield one


def resume(folder: Path, asked: Experiment | None = None, courier: Courier | None = None) -> Run:
    """The run of that folder, to go on where it stopped. `asked`: must be the same experiment as the folder's."""
    import tomllib

    file = folder / "experiment.toml"
    if not file.exists():
        raise UserError(f"--resume {folder}: no run there (no experiment.toml); start one with `fedtailor run FILE`")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"--resume {folder}: {file.name} is damaged ({error}); start anew with `fedtailor run FILE`"
        ) from error
    command = table.pop("command", "")
    experiment = parse(table, str(file))
    if asked is not None and as_table(asked) != as_table(experiment):
        mine, theirs = as_table(asked), as_table(experiment)
        differing = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        raise UserError(
            f"--resume {folder}: holds another experiment (differs in {', '.join(differing)}); leave FILE out, or start anew"
        )
    return Run(experiment, folder, command, courier=courier)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process per run folder. Raises UserError when another holds it."""
    with held(folder / ".lock") as mine:
        if not mine:
            raise UserError(f"{folder}: another process is running this; wait for it or end it")
        yield
