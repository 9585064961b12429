"""Questions over an engine, one round each, for as long as someone asks: `fedtailor ask`, in the shell and as a page."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtailor import data as rows_of
from fedtailor import experiment as experiments
from fedtailor import models, runs, wire
from fedtailor.core import Reply, Silo, To, Total, Wait
from fedtailor.data import SiloData
from fedtailor.engines import courier
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment, Running
from fedtailor.retrieval import store
from fedtailor.retrieval.answered import Answered, Answerer
from fedtailor.retrieval.corpus import Corpus

TELLING = 60.0  # seconds in which silos elsewhere tell of their documents, before the first question


@dataclass
class Turn:
    """An `Ask` whose round is the question's."""

    engine: Running
    silos: tuple[str, ...]
    round: int = 0
    rounds: int = 1

    @property
    def here(self) -> Silo:
        return self.engine.reach(self.round).here

    def __call__(self, work: Any, body: Any, *, to: To = None, deadline: Wait = None) -> Iterator[Reply[Any]]:
        return self.engine.reach(self.round)(work, body, to=to, deadline=deadline)

    def total(self, work: Any, body: Any, *, to: To = None, deadline: Wait = None) -> Total[Any]:
        return self.engine.reach(self.round).total(work, body, to=to, deadline=deadline)


@dataclass
class Session:
    """An `Answerer`."""

    turn: Turn
    model: Answerer
    unheard: Mapping[str, str] = field(default_factory=dict)  # silo -> why it told nothing at the beginning

    @property
    def silos(self) -> tuple[str, ...]:
        return self.turn.silos

    def ask(self, question: str) -> Iterator[Answered]:
        engine = self.turn.engine
        self.turn.round += 1
        engine.rejected.clear()
        try:
            for piece in self.model.ask(question):
                why = {silo: told for _, silo, told in engine.rejected}
                known = {silo: why.get(silo, told) for silo, told in piece.missing.items()}
                yield replace(piece, missing={**self.unheard, **known})
        finally:
            engine.commit()


def asking(method: Any, engine: Running, base: models.Resident, served: Any = None) -> Session:
    """Has silos tell of their documents first. `served`: what a run served. Raises RunError where no silo tells."""
    turn = Turn(engine, engine.silos)
    served = method.serve(method.begin(turn)) if served is None else method.again(served, turn)
    why = {silo: told for _, silo, told in engine.rejected}
    unheard = {silo: why.get(silo, "it embeds by another model") for silo in engine.silos if silo not in served.told}
    return Session(turn, served.open({"base": base}, turn), unheard)


def of_indexes(experiment: Experiment, indexes: Mapping[str, Path]) -> Session:
    """Over index files, each a silo, in this process."""
    for path in indexes.values():
        store.load(path).db.close()  # what is not there is told now
    base = models.load(experiment.model)
    data = {silo: SiloData((), (), (), corpus=Corpus(silo, experiment.data.documents, path)) for silo, path in indexes.items()}
    experiment.method.ready(base, data)
    return asking(experiment.method, InProcess(data, {"base": base}), base)


def of_experiment(experiment: Experiment) -> Session:
    """Over the corpora that the experiment names, in this process."""
    if not experiment.data.corpus:
        raise UserError("[data] corpus is missing: it names what is searched; or name indexes with --index")
    loaded, base = rows_of.load(experiment.data, experiment.silo, experiment.seeds[0]), models.load(experiment.model)
    experiment.method.ready(base, loaded.silos)
    return asking(experiment.method, InProcess(loaded.silos, {"base": base}), base)


def of_run(folder: Path) -> Session:
    """Over the corpora of a finished run, as it learnt to ask them. Raises UserError where there is none."""
    files = sorted((*folder.glob("adapter/served.safetensors"), *folder.glob("seed-*/adapter/served.safetensors")))
    if not files or not (folder / "experiment.toml").exists():
        raise UserError(f"{folder}: no finished run there (no adapter/served.safetensors)")
    experiment = runs.resume(folder).experiment
    needed(experiment, str(folder))
    base = models.load(experiment.model)
    loaded = rows_of.load(experiment.data, experiment.silo, experiment.seeds[0])
    return asking(experiment.method, InProcess(loaded.silos, {"base": base}), base, wire.read_file(files[0]))


@contextlib.contextmanager
def of_federation(experiment: Experiment, kit: Path) -> Iterator[Session]:
    """Over silos elsewhere: the server's kit."""
    base = models.load(experiment.model)
    method = replace(experiment.method, telling=experiment.method.telling or TELLING)
    method.ready(base, {})
    with courier.of(kit) as reached:
        blank = replace(experiment.data, source="", corpus="", public="")  # silos are asked of their documents, not of rows
        opening = Open(f"ask/{secrets.token_hex(8)}", 0, blank, experiment.model, threads=experiment.engine.threads)
        engine = Remote(
            reached, opening, 1, experiment.engine.deadline, patience=min(experiment.engine.patience, method.deadline),
            model_sha256=base.sha256, tokenizer_sha256=base.tokenizer_sha256, models={"base": base},
        )  # fmt: skip
        yield asking(method, engine, base)


def plain(model: str, sets: Sequence[str] = ()) -> Experiment:
    """Without a file: every setting as it comes."""
    table: dict[str, Any] = {
        "name": "ask", "model": {"name": model}, "method": {"name": "rag"},
        "data": {"source": "", "template": "{question}", "answer": "answer", "silo_column": "silo"},
    }  # fmt: skip
    for text in sets:
        experiments.set_over(table, text)
    return experiments.parse(table, "fedtailor ask")


def needed(experiment: Experiment, place: str) -> None:
    """Raises UserError for a method that answers no questions by asking."""
    if not hasattr(experiment.method, "judge"):
        name = experiments.name_of(type(experiment.method))
        raise UserError(f"{place}: its method is {name!r}, which asks no silo for passages; name an experiment of 'rag'")

