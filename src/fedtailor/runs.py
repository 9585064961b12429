"""A run's folder: every row of an experiment, one after the other, resumable at any moment, ending in result.json.

    runs/<name>/  experiment.toml  plan.json  result.json  rounds.jsonl  report.html  adapter/
                  rows/<row>/[<silo>/]  row.json  rounds.jsonl  state/
With several seeds, seed-<n>/ holds each seed's rows, and result.json their means. docs: DESIGN.md, "result.json".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedtailor import __version__, baselines, models, peak, progress, wire
from fedtailor import data as rows_of
from fedtailor import evaluate as scoring
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, UserError
from fedtailor.evaluate import Evaluate
from fedtailor.experiment import Experiment, as_table, drawn, parse, run
from fedtailor.generations import Generations
from fedtailor.merging import merge
from fedtailor.preparing import prepare
from fedtailor.report import VERSION

ADDED = ("bytes_up", "bytes_down", "evaluation_bytes_up", "evaluation_bytes_down", "seconds", "evaluation_seconds")


@dataclass
class Run:
    """One experiment in one folder, one seed at a time."""

    experiment: Experiment
    folder: Path
    command: str = ""
    prepared: tuple[rows_of.Loaded, models.Resident] | None = None  # the first seed's rows, and the base
    plan: dict[str, Any] = field(default_factory=dict)  # threads and cohort sizes, fixed before the first step

    def conduct(self) -> dict[str, Any]:
        """All rows of all seeds; what is finished already is not done again. Returns, and writes, the result."""
        with locked(self.folder):
            self._settle_plan()
            first, resident = self.prepared or prepare(self.experiment)
            self._same("model", "the base model or its dtype", resident.sha256)
            seeds, results = self.experiment.seeds, {}
            environment: dict[str, Any] = {}
            for seed in seeds:
                loaded = first if seed == seeds[0] else rows_of.load(self.experiment.data, self.experiment.silo, seed)
                self._same_data(seed, loaded.sha256)
                here = self.folder if len(seeds) == 1 else self.folder / f"seed-{seed}"
                before = [self.folder / f"seed-{s}" for s in seeds[: seeds.index(seed)]]
                one = Seed(self, seed, here, resident, loaded.silos, before)
                results[seed] = one.conduct()
                environment = self._environment(resident, loaded.sha256)
                if len(seeds) > 1:
                    _write_json(here / "result.json", self._result(environment, [seed], results[seed]))
            merged = results[seeds[0]] if len(seeds) == 1 else merge(results)
            result = self._result({**environment, "plan": self.plan}, list(seeds), merged)
            _write_json(self.folder / "result.json", result)
            return result

    def planned(self, plan: Mapping[str, int]) -> None:
        self.plan["cohort"] = dict(plan)
        _write_json(self.folder / "plan.json", self.plan)

    def _settle_plan(self) -> None:
        file = self.folder / "plan.json"
        if file.exists():
            self.plan = _read_json(file)
        else:
            self.plan = {"threads": self.experiment.engine.threads or torch.get_num_threads(), "cohort": {}}
            _write_json(file, self.plan)
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
            _write_json(self.folder / "plan.json", self.plan)

    def _environment(self, resident: models.Resident, data_sha256: str) -> dict[str, Any]:
        import peft
        import transformers

        cohort = self.experiment.engine.cohort
        return {
            "fedtailor": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__, "python": platform.python_version(), "system": platform.system(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
            "dtype": str(resident.module.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "cohort": max([1, *self.plan["cohort"].values()]) if cohort == "auto" else cohort,
            "model": resident.source if resident.source == "tiny" else self.experiment.model.name,
            "model_sha256": resident.sha256, "data_sha256": data_sha256,
        }  # fmt: skip

    def _result(self, environment: Mapping[str, Any], seeds: list[int], rows: Mapping[str, Any]) -> dict[str, Any]:
        experiment = as_table(self.experiment)
        source = Path(experiment["data"]["source"])
        if source.is_absolute():  # results are passed on: they need not say where the rows lie
            experiment["data"]["source"] = source.name
        return {
            "version": VERSION, "name": self.experiment.name, "experiment": experiment, "seeds": seeds,
            "environment": dict(environment), "command": self.command, "rows": dict(rows),
        }  # fmt: skip


@dataclass
class Seed:
    """All rows of one seed."""

    run: Run
    seed: int
    folder: Path
    resident: models.Resident
    data: dict[str, SiloData]
    before: Sequence[Path]  # folders of earlier seeds: rows that no seed can change are taken from there

    def conduct(self) -> dict[str, Any]:
        experiment = self.run.experiment
        found: dict[str, Any] = {}
        for row in experiment.rows:
            file = self.folder / "rows" / row / "row.json"
            if not file.exists() and row == "zero_shot":
                self._taken(file)
            if not file.exists():
                progress.line(f"{row}{'' if len(experiment.seeds) == 1 else f' (seed {self.seed})'} ...")
                file.parent.mkdir(parents=True, exist_ok=True)
                _write_json(file, {"test_sha256": self._test_sha256, **self._row(row)})
            found[row] = _read_json(file)
            found[row].pop("test_sha256", None)
        return found

    @cached_property
    def _test_sha256(self) -> str:
        return rows_of.sha256(self.data, ("test",))

    def _taken(self, file: Path) -> None:
        for earlier in self.before:
            other = earlier / "rows" / "zero_shot" / "row.json"
            if other.exists() and _read_json(other).get("test_sha256") == self._test_sha256:
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other, file)

    def _row(self, row: str) -> dict[str, Any]:
        experiment = self.run.experiment
        peak.reset()
        if row == "zero_shot":
            return self._served(baselines.zero_shot(self.data))
        if row == "few_shot":
            return self._served(baselines.few_shot(self.data, experiment.evaluate.examples, self.seed))
        if row == "alone":
            return self._alone()
        folder = self.folder / "rows" / row
        if row == "centralized":
            method = experiment.method_of(row).pooled(drawn(len(self.data), experiment.participation))
            return self._trained(folder, baselines.pooled(self.data), method)
        return self._trained(folder, self.data, experiment.method, federated=True)

    def _served(self, served: Any) -> dict[str, Any]:
        """A row without training."""
        began = time.perf_counter()
        found, _ = self._tested(served)
        return {
            **scoring.summary(found), "bytes_up": 0, "bytes_down": 0, "seconds": 0.0,
            "evaluation_seconds": time.perf_counter() - began, "peak_memory_mb": peak.megabytes(), "trained_parameters": 0,
            "samples": self._samples(served),
        }  # fmt: skip

    def _trained(
        self, folder: Path, data: Mapping[str, SiloData], method: Any, federated: bool = False
    ) -> dict[str, Any]:
        """A row that trains over `data` and is tested on every silo's test rows."""
        experiment = self.run.experiment
        engine = self._engine(data, experiment.rounds, f"{experiment.name}/{folder.name}", disturbed=federated)
        report = run(experiment, engine, Generations(folder), method, self.seed)
        if federated:
            shutil.copyfile(folder / "rounds.jsonl", self.folder / "rounds.jsonl")
            self._export(method, report.served)
        began = time.perf_counter()
        found, traffic = self._tested(report.served)
        sums = {name: sum(entry.get(name, 0) for entry in report.log) for name in ADDED}
        sums["evaluation_seconds"] += time.perf_counter() - began
        sums["evaluation_bytes_up"] += traffic[0]
        sums["evaluation_bytes_down"] += traffic[1]
        tensors = wire.tensors_of(report.served)
        return {
            **scoring.summary(found), **sums, "peak_memory_mb": peak.megabytes(),
            "trained_parameters": sum(t.numel() for t in tensors.values()),
            "best_round": report.best_round, "rounds": experiment.rounds, "rejected": _counted(report.log),
            "samples": self._samples(report.served),
        }  # fmt: skip

    def _alone(self) -> dict[str, Any]:
        """Each silo for itself: per_silo[s] is silo s's model over all silos' tests, own[s] over its own."""
        parts: dict[str, dict[str, Any]] = {}
        for silo in self.data:
            folder = self.folder / "rows" / "alone" / _file_name(silo)
            file = folder / "row.json"
            if not file.exists():
                progress.line(f"alone: {silo} ...")
                method = self.run.experiment.method_of("alone")
                _write_json(file, self._trained(folder, baselines.alone(self.data, silo), method))
            parts[silo] = _read_json(file)
        names = {
            name
            for part in parts.values()
            for name, value in part.items()
            if isinstance(value, dict) and "mean" in value
        }
        everywhere = {
            silo: {name: part[name]["mean"] for name in names if name in part} for silo, part in parts.items()
        }
        own = {
            silo: {n: part[n]["per_silo"][silo] for n in names if silo in part.get(n, {}).get("per_silo", {})}
            for silo, part in parts.items()
        }
        first = next(iter(parts.values()))
        return {
            **scoring.summary(everywhere), "own": scoring.summary(own),
            **{name: sum(part[name] for part in parts.values()) for name in ADDED},
            "peak_memory_mb": max(part["peak_memory_mb"] for part in parts.values()),
            "trained_parameters": first["trained_parameters"], "rounds": self.run.experiment.rounds,
            "samples": first["samples"],
        }  # fmt: skip

    def _engine(self, data: Mapping[str, SiloData], rounds: int, name: str, disturbed: bool) -> InProcess:
        experiment = self.run.experiment
        more: dict[str, Any] = {"faults": experiment.faults} if disturbed else {}
        if experiment.engine.record and disturbed:
            more["record"] = Recorder(self.folder / "messages")
        return InProcess(
            data, {"base": self.resident}, seed=self.seed, rounds=rounds, run=f"{name}/{self.seed}",
            cohort=experiment.engine.cohort, plan=dict(self.run.plan["cohort"]), on_plan=self.run.planned, **more,
        )  # fmt: skip

    def _tested(self, served: Any) -> tuple[dict[str, dict[str, float]], tuple[int, int]]:
        """Metrics per silo on the test rows: read once, here."""
        tested = {name: rows for name, rows in self.data.items() if rows.test}
        if not tested:
            return {}, (0, 0)
        engine = self._engine(tested, 0, "test", disturbed=False)
        body = Evaluate(served, "test", self.run.experiment.evaluate.max_new_tokens)
        found = scoring.ask_all(engine.reach(0, disturbed=False), body)
        if engine.rejected:  # a mean over other silos would stand beside the other rows' as if it were the same
            why = "; ".join(f"{silo}: {why}" for _, silo, why in engine.rejected[:3])
            raise RunError(f"test rows could not be scored: {why}")
        return found, engine.traffic.take()

    def _samples(self, served: Any) -> Sequence[dict[str, str]]:
        settings = self.run.experiment.evaluate
        return baselines.samples(
            served.open({"base": self.resident}), self.data, settings.samples, settings.max_new_tokens
        )

    def _export(self, method: Any, served: Any) -> None:
        """adapter/, made beside and moved into place."""
        beside, target = self.folder / ".adapter.tmp", self.folder / "adapter"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        wire.write_file(beside / "served.safetensors", served)  # what `fedtailor chat` opens
        if hasattr(method, "export"):
            with _disk_told(beside):
                method.export(self.resident, served.tensors, beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)


@contextlib.contextmanager
def _disk_told(folder: Path) -> Iterator[None]:
    """Libraries written in Rust tell a full disk in their own words: say it in the system's."""
    try:
        yield
    except Exception as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


@dataclass
class Recorder:
    """Keeps every message of the wire, numbered, for audits; a resumed run numbers on."""

    folder: Path
    count: int = 0

    def __post_init__(self) -> None:
        self.count = 1 + max((int(file.name[:6]) for file in self.folder.glob("[0-9]*")), default=-1)

    def __call__(self, silo: str, direction: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        wire.write_bytes(self.folder / f"{self.count:06d}-{direction}-{_file_name(silo)}.safetensors", data)
        self.count += 1


def begin(experiment: Experiment, out: Path | None, command: str) -> Run:
    """A new run in `out`, or in runs/<name>, or, where that is taken, in runs/<name>-2 and so on: nothing is overwritten."""
    folder = out or Path("runs") / experiment.name
    number = 2
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another with --out")
    while folder.exists() and any(folder.iterdir()):
        if out is not None:
            raise UserError(f"--out {out}: not empty; choose another, or go on with `fedtailor run --resume {out}`")
        folder = Path("runs") / f"{experiment.name}-{number}"
        number += 1
    import tomli_w

    prepared = prepare(experiment)  # what cannot run leaves no folder behind
    folder.mkdir(parents=True, exist_ok=True)
    text = tomli_w.dumps({**as_table(experiment), "command": command})
    wire.write_bytes(folder / "experiment.toml", text.encode())
    return Run(experiment, folder, command, prepared)




def resume(folder: Path, asked: Experiment | None = None) -> Run:
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
    return Run(experiment, folder, command)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process per run folder. Raises UserError when another holds it."""
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another process is running this; wait for it or end it") from error
        yield


def _counted(log: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in log:
        for silo, why in entry["rejected"].items():
            counts[f"{silo}: {why}"] = counts.get(f"{silo}: {why}", 0) + 1
    return counts


def _file_name(silo: str) -> str:
    """A silo's name as a file name: readable, and different for different names."""
    import hashlib

    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in silo)[:60]
    return safe if safe == silo else f"{safe}-{hashlib.sha256(silo.encode()).hexdigest()[:8]}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and what it held is done again") from error


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wire.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
