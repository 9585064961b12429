"""An embedder learns from what silos were asked and answered, by a method that averages: see `learner`. No text leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fedtailor import wire
from fedtailor.core import Ask, Reply, Silo, To, Total, Wait, in_silo
from fedtailor.data import Row
from fedtailor.errors import SiloError, UserError
from fedtailor.methods import averaging
from fedtailor.methods.averaging import Averaging, State, Train, Trained
from fedtailor.retrieval.learner import TEMPERATURE, Pairs, drawn, learner
from fedtailor.training import Local
from fedtailor.tuned import HEAD


@dataclass(frozen=True)
class Contrast(Train):
    """Down, each round: as `Train`, of an embedder. Up comes `Trained`: the change of the trainable tensors, rows seen, and the
    mean loss in nats of a pair. Questions, passages, their tokens and their vectors stay."""

    embedder: str = ""
    sha256: str = ""  # of its weights: a change of others must not be averaged in
    temperature: float = TEMPERATURE
    both: bool = False  # each passage is to find its question among the batch's, too


@in_silo
def train(silo: Silo, body: Contrast) -> Trained:
    pairs = paired(silo.data.train)
    if len(pairs) < 2:
        raise SiloError(f"{len(pairs)} training rows with a question and an answer: learning to tell them apart needs 2 or more")
    try:
        one = learner(body.embedder, body.method)
    except UserError as error:
        raise SiloError(str(error)) from error
    if one.base.sha256 != body.sha256:
        raise SiloError(f"its embedder {body.embedder!r} has other weights than the server's; load the same")

    def batches(silo: Silo, how: Local) -> list[list[Pairs]]:
        return [[one.batch([pairs[i] for i in some]) for some in step] for step in drawn(len(pairs), how, silo.seed)]

    reader = one.reader(body.temperature, body.both)
    (up,) = averaging.taught([silo], body, body.method, one.resident, reader, batches)
    if isinstance(up, wire.Failure):
        raise SiloError(up.error.replace("method.", "method.trainer."))
    return up


def begin(trainer: Averaging, name: str, ask: Ask) -> State:
    """The first tensors, made by the server: the same for the same seed."""
    return State(learner(name, trainer).initial(ask.here.seed), silos=len(ask.silos))


def round(
    trainer: Averaging, name: str, state: State, ask: Ask, temperature: float = TEMPERATURE, both: bool = False
) -> State:
    """The state after a round of training in all silos, combined as the trainer does it."""
    told = {"embedder": name, "sha256": learner(name, trainer).base.sha256, "temperature": temperature, "both": both}
    return trainer.round(state, _Contrasting(ask.silos, ask.round, ask.rounds, ask.here, ask, told))


def example(trainer: Averaging, name: str, number: int = 1) -> Trained:
    """As `Averaging.example`, of this embedder."""
    made = trainer.example(learner(name, trainer).resident, 0, number)
    delta, control = ({n: t for n, t in some.items() if n not in HEAD} for some in (made.delta, made.control))
    return replace(made, delta=delta, control=control)


@dataclass
class _Contrasting:
    """Asks for `Contrast` wherever a trainer asks for `Train`."""

    silos: tuple[str, ...]
    round: int
    rounds: int
    here: Silo
    ask: Ask
    told: Mapping[str, Any]

    def __call__(self, work: Any, body: Any, *, to: To = None, deadline: Wait = None) -> Iterator[Reply[Any]]:
        return self.ask(train, self._body(body), to=to, deadline=deadline)

    def total(self, work: Any, body: Any, *, to: To = None, deadline: Wait = None) -> Total[Any]:
        return self.ask.total(train, self._body(body), to=to, deadline=deadline)

    def _body(self, body: Train) -> Contrast:
        return Contrast(**{f.name: getattr(body, f.name) for f in fields(Train)}, **self.told)


def paired(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(question, passage) of each row that has both."""
    every = ((row.input.strip(), row.answer.strip()) for row in rows)
    return [(question, answer) for question, answer in every if question and answer]
