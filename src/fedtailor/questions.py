"""Rows of methods that answer by asking: their questions are those of who asks, and are judged there, over whatever is asked.

In one process the questions are the silos' validation and test rows, each named silo/id: the document that answers it. Over a
federation they are the server's own, [data] public.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedtailor import energy, peak, wire
from fedtailor.core import Ask
from fedtailor.data import Row, SiloData
from fedtailor.experiment import Heard, Report, run
from fedtailor.generations import Generations
from fedtailor.retrieval.answerer import question_of

if TYPE_CHECKING:
    from fedtailor.seeds import Seed

Rows = tuple[Row, ...]


def of(seed: Seed) -> tuple[Rows, Rows]:
    """Validation and test questions."""
    if seed.run.courier:
        return (), seed.public
    named = {
        part: tuple(replace(row, id=f"{silo}/{row.id}") for silo, rows in seed.data.items() for row in getattr(rows, part))
        for part in ("val", "test")
    }
    return named["val"], named["test"]


def row(
    seed: Seed, folder: Path, data: Mapping[str, SiloData], method: Any, federated: bool = False, heard: Heard = len
) -> dict[str, Any]:
    """A row over `data`: silos tell of their documents, the retriever is trained where there is a trainer, then the test
    questions are asked. zero_shot: the model alone."""
    experiment = seed.run.experiment
    peak.reset()
    engine = seed.engine(data, experiment.rounds, f"{experiment.name}/{folder.name}", disturbed=federated)
    log: list[dict[str, Any]] = []
    began, traffic = time.perf_counter(), (0, 0)
    rounds: dict[str, Any] = {}
    trained: Mapping[str, Tensor] = {}
    if folder.name == "zero_shot":
        served = method.bare()
    elif method.trainer:
        report = run(experiment, engine, Generations(folder), method, seed.seed, heard)
        served, log, trained = report.served, report.log, report.last.learnt.tensors
        rounds = {"best_round": report.best_round, "rounds": experiment.rounds}
        traffic = sum(entry["bytes_up"] for entry in log), sum(entry["bytes_down"] for entry in log)
        if federated:
            wire.write_bytes(seed.folder / "rounds.jsonl", (folder / "rounds.jsonl").read_bytes())
            seed.export(method, report)
    else:
        state = method.begin(engine.reach(0))
        served, traffic = method.serve(state), engine.traffic.take()
        if federated:
            seed.export(method, Report(state, served, 0, []))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    ask = engine.reach(experiment.rounds + 1)
    found = method.judge(served, ask, "test", True)
    up, down = engine.traffic.take()
    rejected: dict[str, int] = {}
    for _, silo, why in engine.rejected:
        rejected[f"{silo}: {why}"] = rejected.get(f"{silo}: {why}", 0) + 1
    return {
        **found, "bytes_up": traffic[0], "bytes_down": traffic[1], "seconds": seconds,
        "evaluation_bytes_up": up, "evaluation_bytes_down": down, "evaluation_seconds": time.perf_counter() - began,
        "peak_memory_mb": peak.megabytes(), "trained_parameters": sum(t.numel() for t in trained.values()), **rounds,
        "rejected": rejected, "samples": _samples(seed, served, ask), **energy.total(log[1:]),
    }  # fmt: skip


def _samples(seed: Seed, served: Any, ask: Ask) -> list[dict[str, str]]:
    """A few test questions, the first of each silo in turn, and the answers with their sources."""
    count = seed.run.experiment.evaluate.samples
    rows = list(ask.here.data.test)
    by_silo: dict[str, list[Row]] = {}
    for one in rows:
        by_silo.setdefault(one.id.partition("/")[0], []).append(one)
    turns = [(silo, some[i]) for i in range(count) for silo, some in by_silo.items() if i < len(some)][:count]
    model = served.open(ask.here.models, ask if served.told else None)
    told = []
    for silo, one in turns:
        asked = question_of(one)
        text = model.answers([asked])[0] if not served.told else [*model.ask(asked)][-1].text
        told.append({"silo": silo, "prompt": one.prompt or asked, "answer": one.answer, "generated": text})
    return told
