"""All rows of one seed, one after the other: zero-shot, few-shot, each silo alone, federated, centralized."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtailor import baselines, energy, loaders, models, paired, peak, poisoning, progress, questions, tracking, wire
from fedtailor import data as rows_of
from fedtailor import evaluate as scoring
from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.errors import RunError
from fedtailor.evaluate import Evaluate
from fedtailor.experiment import Heard, Report, drawn, run
from fedtailor.files import file_name, read_json, write_json
from fedtailor.generations import Generations
from fedtailor.packed import Packed

if TYPE_CHECKING:
    from fedtailor.runs import Run

ADDED = ("bytes_up", "bytes_down", "evaluation_bytes_up", "evaluation_bytes_down", "seconds", "evaluation_seconds")


@dataclass
class Seed:
    """All rows of one seed."""

    run: Run
    seed: int
    folder: Path
    resident: models.Resident
    data: dict[str, SiloData]
    before: Sequence[Path]  # folders of earlier seeds: rows that no seed can change are taken from there
    public: tuple[Row, ...] = ()  # the server's own

    def conduct(self) -> dict[str, Any]:
        experiment = self.run.experiment
        found: dict[str, Any] = {}
        for row in self.run.rows:
            file = self.folder / "rows" / row / "row.json"
            if not file.exists() and not self.run.courier:  # afar, test rows are not known here
                self._taken(row, file)
            if not file.exists():
                progress.line(f"{row}{'' if len(experiment.seeds) == 1 else f' (seed {self.seed})'} ...")
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"test_sha256": self._test_sha256, **self._row(row)})
            found[row] = read_json(file)
            found[row].pop("test_sha256", None)
        if "federated" in found and (hasattr(experiment.method, "hand_written")):
            file = self.folder / "rows" / "federated" / "paired.json"
            if not file.exists():
                write_json(file, self._pairs(self.run.rows))
            found["federated"]["paired"] = read_json(file)
        return found

    @cached_property
    def _test_sha256(self) -> str:
        return rows_of.sha256(self.data, ("test",))

    def _taken(self, row: str, file: Path) -> None:
        for earlier in (*(self.before if row == "zero_shot" else ()), *self.run.others.get(row, ())):
            other = earlier / "rows" / row / "row.json"
            if other.exists() and read_json(other).get("test_sha256") == self._test_sha256:
                write_json(file, read_json(other))

    def _row(self, row: str) -> dict[str, Any]:
        experiment = self.run.experiment
        peak.reset()
        if row == "zero_shot" and hasattr(experiment.method, "judge"):
            return questions.row(self, self.folder / "rows" / row, self.data, experiment.method)
        if row == "zero_shot":
            return self._served(baselines.zero_shot(self.data))
        if row == "few_shot":
            return self._served(baselines.few_shot(self.data, experiment.evaluate.examples, self.seed))
        if row == "alone":
            return self._alone()
        folder = self.folder / "rows" / row
        if row == "hand_written":
            return self._hand_written(folder)
        if row in ("routed", "untrained"):
            other = experiment.method_of(row) if row == "routed" else experiment.method.untrained()
            return self._trained(folder, self.data, other)
        if row == "noiseless":
            return self._trained(folder, baselines.noiseless(self.data), experiment.method.noiseless())
        if row == "centralized":
            method = experiment.method_of(row).pooled(drawn(len(self.data), experiment.participation))
            return self._trained(folder, baselines.pooled(self.data), method)
        data = self.data if self.run.courier else poisoning.poisoned(self.data, experiment.faults, self.seed)
        return self._trained(folder, data, experiment.method, federated=True)

    def _served(self, served: Any) -> dict[str, Any]:
        """A row without training."""
        began = time.perf_counter()
        found, (up, down), rejected = self._tested(served)
        return {
            **scoring.summary(found), "bytes_up": 0, "bytes_down": 0, "seconds": 0.0,
            "evaluation_bytes_up": up, "evaluation_bytes_down": down,
            "evaluation_seconds": time.perf_counter() - began, "peak_memory_mb": peak.megabytes(), "trained_parameters": 0,
            "samples": self._samples(served), **({"rejected": rejected} if rejected else {}),
        }  # fmt: skip

    def _hand_written(self, folder: Path) -> dict[str, Any]:
        """Of the prompts that a search begins with, the one that is best on validation."""
        experiment, name = self.run.experiment, self.run.experiment.evaluate.best_by
        engine = self.engine(self.data, 0, "hand_written", disturbed=False)
        labels = next((rows.labels for rows in self.data.values() if rows.labels), ())
        pool = experiment.method.hand_written(labels)
        best, chosen = None, pool[0]
        for served in pool:
            asked = Evaluate(served, "val", experiment.evaluate.max_new_tokens)
            found = scoring.summary(scoring.ask_all(engine.reach(0, disturbed=False), asked))
            now = found[name]["mean"] if name in found else None
            if now is not None and (best is None or scoring.better(name, now, best)):
                best, chosen = now, served
        up, down = engine.traffic.take()
        self._kept(folder, chosen)
        row = self._served(chosen)
        row["evaluation_bytes_up"] += up
        row["evaluation_bytes_down"] += down
        return {**row, "prompt": chosen.prompt.template}

    def _kept(self, folder: Path, served: Any) -> None:
        """A prompt beside the federated one, to be compared with it, and read."""
        wire.write_file(folder / "served.safetensors", served)
        text = served.prompt.written(self.run.experiment.data.template, served.labels)
        wire.write_bytes(folder / "prompt.txt", text.encode())

    def _pairs(self, rows: Sequence[str]) -> dict[str, dict[str, float]]:
        """Federated minus each other row of prompts, on the same test rows."""
        served = {row: self.folder / "rows" / row / "served.safetensors" for row in rows if row != "federated"}
        served = {row: file for row, file in served.items() if file.exists()}
        if not served:
            return {}
        mine = wire.read_file(self.folder / "adapter" / "served.safetensors")
        engine = self.engine(self.data, 0, "paired", disturbed=False)
        ask = engine.reach(0, disturbed=False)
        return paired.ask_all(ask, mine, {row: wire.read_file(file) for row, file in served.items()})

    def _trained(
        self, folder: Path, data: Mapping[str, SiloData], method: Any, federated: bool = False,
        base: models.Resident | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A row that trains over `data` and is tested on every silo's test rows."""
        with tracking.row(self.run.experiment, method, self.folder, folder, self.seed) as told:
            if hasattr(method, "judge"):
                row = questions.row(self, folder, data, method, federated, told.rounds)
            else:
                row = self._averaged(folder, data, method, federated, base, told.rounds)
            told.end(row)
        return row

    def _averaged(
        self, folder: Path, data: Mapping[str, SiloData], method: Any, federated: bool, base: models.Resident | None,
        heard: Heard,
    ) -> dict[str, Any]:  # fmt: skip
        experiment = self.run.experiment
        engine = self.engine(data, experiment.rounds, f"{experiment.name}/{folder.name}", disturbed=federated, base=base)
        report = run(experiment, engine, Generations(folder), method, self.seed, heard)
        if federated:
            wire.write_bytes(self.folder / "rounds.jsonl", (folder / "rounds.jsonl").read_bytes())
            self.export(method, report)
        elif hasattr(method, "hand_written"):
            self._kept(folder, report.served)
        began = time.perf_counter()
        found, traffic, rejected = self._tested(report.served, base)
        own, attacked = {}, {}
        if federated and experiment.faults.attack == "backdoor":
            tried, more, _ = self._tested(report.served, base, poisoning.triggered(self.data, experiment.faults))
            attacked, traffic = scoring.success(tried), (traffic[0] + more[0], traffic[1] + more[1])
        if federated and hasattr(method, "own"):
            asked = engine.reach(experiment.rounds + 1, disturbed=False)
            before = len(engine.rejected)
            own = {"own": scoring.summary(method.own(asked, "test", experiment.evaluate.max_new_tokens))}
            missing = {f"{silo}: its own model is not in the figures: {why}": 1 for _, silo, why in engine.rejected[before:]}
            rejected, up_down = rejected | missing, engine.traffic.take()
            traffic = traffic[0] + up_down[0], traffic[1] + up_down[1]
        sums = {name: sum(entry.get(name, 0) for entry in report.log) for name in ADDED}
        sums["evaluation_seconds"] += time.perf_counter() - began
        sums["evaluation_bytes_up"] += traffic[0]
        sums["evaluation_bytes_down"] += traffic[1]
        # what is served may hold more: what LoRA's exact aggregation keeps beside the means is not trained
        tensors = getattr(report.state, "tensors", None) or wire.tensors_of(report.served)
        if hasattr(method, "split"):  # of LoRA's factors, one may never be trained
            tensors = {n: t for number in (1, 2) for n, t in method.split(report.state, number)[0].items()}
        return {
            **scoring.summary(found), **attacked, **sums, "peak_memory_mb": peak.megabytes(),
            "trained_parameters": sum(t.numel() for t in tensors.values()),
            "best_round": report.best_round, "rounds": experiment.rounds, "rejected": _counted(report.log) | rejected,
            "samples": self._samples(report.served, base), **own, **_told(report), **energy.total(report.log[1:]),
        }  # fmt: skip

    def _alone(self) -> dict[str, Any]:
        """Each silo for itself: per_silo[s] is silo s's model over all silos' tests, own[s] over its own.

        A silo that cannot train alone is named in `rejected`; the row is that of the others.
        """
        parts: dict[str, dict[str, Any]] = {}
        rejected: dict[str, int] = {}
        for silo in self.data:
            folder = self.folder / "rows" / "alone" / file_name(silo)
            file = folder / "row.json"
            if not file.exists():
                progress.line(f"alone: {silo} ...")
                method, data, base = self.run.experiment.method_of("alone"), baselines.alone(self.data, silo), None
                if hasattr(method, "solo"):
                    method, base = method.solo(self.data[silo].settings)
                    data = {silo: replace(data[silo], settings={})}
                try:
                    write_json(file, self._trained(folder, data, method, base=base and models.load(base)))
                except RunError as error:
                    progress.line(f"alone: {error}")
                    rejected[f"{silo}: {error}"] = 1
                    continue
            parts[silo] = read_json(file)
        if not parts:
            raise RunError(f"no silo could train alone; {next(iter(rejected))}")
        names = {
            name
            for part in parts.values()
            for name, value in part.items()
            if isinstance(value, dict) and "mean" in value
        }
        everywhere, pooled = (
            scoring.over_silos(
                {silo: {n: part[n][kind] for n in names if kind in part.get(n, {})} for silo, part in parts.items()}
            )
            for kind in ("mean", "pooled")
        )
        for name, found in pooled.items():
            everywhere[name]["pooled"] = found["mean"]
        own = {
            silo: {n: part[n]["per_silo"][silo] for n in names if silo in part.get(n, {}).get("per_silo", {})}
            for silo, part in parts.items()
        }
        first = next(iter(parts.values()))
        return {
            **everywhere, "own": scoring.over_silos(own),
            **{name: sum(part[name] for part in parts.values()) for name in ADDED},
            "peak_memory_mb": max(part["peak_memory_mb"] for part in parts.values()),
            "trained_parameters": first["trained_parameters"], "rounds": self.run.experiment.rounds,
            "rejected": rejected, "samples": first["samples"],
            **energy.total(list(parts.values())),
        }  # fmt: skip

    def engine(
        self, data: Mapping[str, SiloData], rounds: int, name: str, disturbed: bool, base: models.Resident | None = None
    ) -> InProcess | Remote:
        experiment = self.run.experiment
        labels = next((rows.labels for rows in data.values() if rows.labels), ())
        val, test = questions.of(self) if hasattr(experiment.method, "judge") else ((), ())
        more: dict[str, Any] = {"public": SiloData(self.public, val, test, labels, {"template": experiment.data.template})}
        if disturbed:
            more["faults"] = experiment.faults
        if experiment.engine.record and disturbed:
            more["record"] = Recorder(self.folder / "messages")
        if self.run.courier is not None:
            opening = Open(
                f"{self.run.plan['run']}/{name}/{self.seed}", self.seed, experiment.data, experiment.model,
                experiment.silo, experiment.engine.threads,
            )  # fmt: skip
            return Remote(
                self.run.courier, opening, rounds, experiment.engine.deadline, experiment.engine.minimum,
                experiment.engine.patience, self.resident.sha256, self.resident.tokenizer_sha256, self.folder / "spool",
                models={"base": self.resident}, **more,
            )  # fmt: skip
        return InProcess(
            data, {"base": base or self.resident}, seed=self.seed, rounds=rounds, run=f"{name}/{self.seed}",
            cohort=experiment.engine.cohort, plan=dict(self.run.plan["cohort"]), on_plan=self.run.planned, **more,
        )  # fmt: skip

    def _tested(
        self, served: Any, base: models.Resident | None = None, data: Mapping[str, SiloData] | None = None
    ) -> tuple[dict[str, scoring.Counts], tuple[int, int], dict[str, int]]:
        """Counts per silo on the test rows: read once, here. Then bytes up and down, and which silos are missing, and why."""
        tested = {name: rows for name, rows in (data or self.data).items() if rows.test or self.run.courier}
        if not tested:
            return {}, (0, 0), {}
        engine = self.engine(tested, 0, "test", disturbed=False, base=base)
        body = Evaluate(served, "test", self.run.experiment.evaluate.max_new_tokens)
        found = scoring.ask_all(engine.reach(0, disturbed=False), body)
        if engine.rejected and not self.run.courier:
            why = "; ".join(f"{silo}: {why}" for _, silo, why in engine.rejected[:3])
            raise RunError(f"test rows could not be scored: {why}")
        # a mean over other silos stands beside the other rows' as if it were the same: so each that is missing is named
        missing = {f"{silo}: its test rows are not in the figures: {why}": 1 for _, silo, why in engine.rejected}
        for told in missing:
            progress.line(told)
        return found, engine.traffic.take(), missing

    def _samples(self, served: Any, base: models.Resident | None = None) -> Sequence[dict[str, str]]:
        settings = self.run.experiment.evaluate
        return baselines.samples(
            served.open({"base": base or self.resident}), self.data, settings.samples, settings.max_new_tokens
        )

    def export(self, method: Any, report: Report) -> None:
        """adapter/, made beside and moved into place."""
        beside, target = self.folder / ".adapter.tmp", self.folder / "adapter"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        served = report.served
        wire.write_file(beside / "served.safetensors", served)  # what `fedtailor chat` opens
        if hasattr(method, "export_prompt"):
            method.export_prompt(report.state, beside, self.run.experiment.data.template, report.last)
        if hasattr(method, "export"):
            with wire.disk_told(beside):
                tensors = served.on(self.resident) if hasattr(served, "on") else served.tensors
                method.export(self.resident, tensors, beside)
                labels = next((silo.labels for silo in self.data.values() if silo.labels), ())
                loaders.classifier(self.resident, labels, beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)


@dataclass
class Recorder:
    """Keeps every message of the row federated, but those of its test, numbered, for audits; a resumed run numbers on."""

    folder: Path
    count: int = 0

    def __post_init__(self) -> None:
        self.count = 1 + max((int(file.name[:6]) for file in self.folder.glob("[0-9]*")), default=-1)

    def __call__(self, silo: str, direction: str, data: Packed) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        wire.write_bytes(self.folder / f"{self.count:06d}-{direction}-{file_name(silo)}.safetensors", data)
        self.count += 1


TOLD = ("model_calls", "epsilon")  # of the last round's notes, what is so of the whole run
SUMS = ("waited",)  # what adds up over all rounds
MEANS = ("public_distance", "declined_share")  # what is told as the mean of all rounds


def _told(report: Report) -> dict[str, Any]:
    """Of a search: calls and epsilon of the whole of it, and the prompt that it found. Of distillation, what public rows were."""
    last = report.log[-1]
    found: dict[str, Any] = {name: last[name] for name in TOLD if name in last}
    found |= {name: sum(told) for name in SUMS if (told := [one[name] for one in report.log if name in one])}
    found |= {name: statistics.fmean(told) for name in MEANS if (told := [one[name] for one in report.log if name in one])}
    prompt = getattr(report.served, "prompt", None)
    return found if prompt is None else {**found, "prompt": prompt.template}


def _counted(log: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in log:
        for silo, why in entry["rejected"].items():
            counts[f"{silo}: {why}"] = counts.get(f"{silo}: {why}", 0) + 1
    return counts
