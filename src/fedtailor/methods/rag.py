"""Retrieval-augmented generation: silos are asked for passages, a model answers from what they let out, and names the sources.

Silos tell once how often each hashed word occurs with them; then scores of passages are comparable, and silos searched apart give
what one index over all would. Nothing is trained, but where a trainer is named: the retriever, over silos (`retrieval.learning`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtailor import progress, trainers, wire
from fedtailor.core import Ask, Method
from fedtailor.data import Row
from fedtailor.errors import RunError, UserError
from fedtailor.methods.averaging import Averaging, Trained
from fedtailor.models import Resident
from fedtailor.retrieval import asking, embedding, judging, learner, learning
from fedtailor.retrieval.answerer import Answering, Asking
from fedtailor.retrieval.asking import Hits, Tell, Told
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.finding import Count


@dataclass(frozen=True)
class State:
    """The server's: what silos told of their documents, and the retriever where it is trained."""

    told: Mapping[str, Told]  # by silo
    learnt: Any = None  # averaging.State of the retriever
    answers: Any = None  # what answers in place of [model] alone: another run's, as served
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of the retriever that silos told of; {}: as it comes
    fresh: bool = True  # whether what they told is of the retriever as it is now
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What is served: with whom to search, and how to answer. Holds counts of hashed words, and no text."""

    method: Rag
    told: Mapping[str, Told]  # none: silos have not embedded by this retriever yet
    tensors: Mapping[str, Tensor]  # of the retriever; {}: as it comes
    answers: Any = None

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Asking:
        """Without `ask` the model answers from what it knows."""
        resident = models["base"]
        model = self.answers.open(models) if self.answers is not None else None
        embedders = self.method.searched_by(self.told, self.tensors) if ask is not None else {}
        return Asking(self.method, resident, model, ask, self.told, embedders)


@dataclass(frozen=True)
class Rag(Answering, Method[State]):
    """Settings, beside those of `Ways` and `Answering`. What leaves a silo its own policy says, [documents] of its silo.toml."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    one_by_one: ClassVar[str] = "each silo has an index of its own"

    embedder: str = "minilm"  # a packaged encoder, a folder or a hub id; silos' indexes are by it
    telling: Annotated[float, Field(gt=0)] | None = None  # seconds for silos to tell of their documents; None: the engine's own
    embedders: tuple[str, ...] = ()  # with merge = "ranks": what silos may have been indexed by besides
    trainer: Mapping[str, Any] = field(default_factory=dict)  # trains it over silos: a table as [method] of one that averages
    temperature: Annotated[float, Field(gt=0)] = 0.05  # of its contrastive loss
    embed_every: Count = 1  # rounds until silos embed their documents anew, and it is validated; after the last one they do
    answers: str = ""  # a finished run's folder, whose model on the same base answers; "": [model] as it is
    answered: Count | None = None  # questions of each silo that are answered in text when a run is judged; None: all
    centroids: Annotated[int, Field(ge=0)] = 16  # of each silo at most, where route > 0; its policy says how many, and the noise

    def __post_init__(self) -> None:
        if self.trainer:
            self.trains  # noqa: B018  it is checked
            if self.merge == "ranks":
                raise ValueError('trainer is of one retriever for all silos, merge = "ranks" for silos with their own; choose')
        if self.candidates < max(self.passages, self.reranked if self.rerank else 0):
            raise ValueError(f"candidates = {self.candidates} is fewer than the passages to choose; raise it")

    @property
    def BESIDES(self) -> str:
        """What leaves a silo beside `example`."""
        training = "This is of the retriever's training; then, of a question, numbers and scores of its candidates."
        return (
            f"{training if self.trainer else 'This is of one question, and of the candidates alone.'} Besides: once, in how "
            "many passages each hashed word is (12 bytes a word), and with route > 0 noisy means of groups of vectors; of the "
            "passages that win, what the silo's own policy ([documents]) lets out. Questions go to silos as vectors and hashed "
            "words; to one that shares answers alone, as text."
        )

    @property
    def trains(self) -> Averaging:
        return trainers.named(self.trainer, "trainer")

    def ready(self, resident: Resident, silos: Mapping[str, Any]) -> None:
        """Raises UserError for whatever can be known to fail before a silo is asked."""
        embedding.resident(self.embedder)
        self._other()
        lacking = [name for name, data in silos.items() if data.train and getattr(data, "corpus", None) is None]
        if lacking:
            raise UserError(
                f"silo {lacking[0]!r} has no documents: set [data] corpus to a table of passages, or to 'FOLDER/{{silo}}.index'"
            )

    def begin(self, ask: Ask) -> State:
        learnt = learning.begin(self.trains, self.embedder, ask) if self.trainer else None
        return self._told(State({}, learnt, self._other()), ask)

    def round(self, state: State, ask: Ask) -> State:
        """Without a trainer: documents may have changed, so silos are asked anew."""
        if self.trainer:
            learnt = learning.round(self.trains, self.embedder, state.learnt, ask, self.temperature)
            state = replace(state, learnt=learnt, notes=learnt.notes, fresh=False)
            if ask.round % self.embed_every and ask.round != ask.rounds:
                return state
            state = replace(state, tensors=learnt.tensors, fresh=True)
        return self._told(state, ask)

    def serve(self, state: State) -> Served:
        return Served(self, state.told if state.fresh else {}, state.tensors, state.answers)

    def again(self, served: Served, ask: Ask) -> Served:
        """What was served before, as the silos tell of their documents now."""
        state = self._told(State(served.told, answers=served.answers, tensors=served.tensors), ask)
        return self.serve(state)

    def pooled(self, silos: int) -> Rag:
        """One index over all documents; its retriever is trained as long as all silos'."""
        trainer = {"name": self.trainer["name"], **asdict(self.trains.pooled(silos))} if self.trainer else {}
        return replace(self, route=0, trainer=trainer)

    def untrained(self) -> Rag | None:
        """With the retriever as it comes; None where it stays so anyway."""
        return replace(self, trainer={}) if self.trainer else None

    @property
    def chooses_by(self) -> tuple[str, ...]:
        """Of validation questions; without a trainer there is nothing to choose."""
        return ("recall_at_5", "mrr") if self.trainer else ()

    def bare(self) -> Served:
        """The model alone, without a passage."""
        return Served(self, {}, {}, self._other())

    def judge(self, served: Served, ask: Ask, split: str, write: bool) -> dict[str, Any]:
        """Figures over the questions of who asks, `ask.here`. Without `write` no answer is made in text."""
        if served.tensors and not served.told:
            return {}
        rows = getattr(ask.here.data, split, ())
        model = served.open(ask.here.models, ask if served.told else None)
        return judging.summary(judging.figures(model, rows, self._few(rows) if write else ()), rows)

    def _few(self, rows: Sequence[Row]) -> list[Row]:
        """The first `answered` of each silo."""
        count = Counter[str]()
        kept = list[Row]()
        for row in rows:
            count[silo := row.id.partition("/")[0]] += 1
            if self.answered is None or count[silo] <= self.answered:
                kept.append(row)
        return kept

    def searched_by(self, told: Mapping[str, Told], tensors: Mapping[str, Tensor]) -> dict[str, Embedder]:
        """By SHA-256: those whose vectors silos search. What is loaded says the asker, and no silo."""
        wanted = {silo.sha256 for silo in told.values()}
        return {one.sha256: one for one in self._models(tensors) if one.sha256 in wanted}

    def _models(self, tensors: Mapping[str, Tensor]) -> list[Embedder]:
        """The embedder, with what it learnt; then those that silos may have besides."""
        one = asking.trained(self.embedder, self.trainer, tensors) if tensors else embedding.resident(self.embedder)
        return [one, *map(embedding.resident, self.embedders if self.merge == "ranks" else ())]

    def example(self, resident: Resident, labels: int, number: int = 1) -> Hits | Trained:
        """A reply of a round of training, or to one question, of `candidates` passages."""
        if self.trainer:
            return learning.example(self.trains, self.embedder, number)
        n = self.candidates
        scores = torch.zeros(n, dtype=torch.float64)
        return Hits(torch.zeros(n, dtype=torch.int64), scores, scores, torch.tensor([n], dtype=torch.int32))

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A retriever that was trained, as retriever/: for sentence-transformers, and `fedtailor index add --embedder`."""
        if tensors:
            learner.export(learner.learner(self.embedder, self.trains), tensors, folder / "retriever")

    def _told(self, state: State, ask: Ask) -> State:
        now, *others = self._models(state.tensors)
        body = Tell(
            self.embedder, now.base_sha256, now.sha256, self.trainer if state.tensors else {}, state.tensors,
            self.centroids if self.route else 0, self.merge == "ranks", self.search == "approximate",
        )  # fmt: skip
        known = {one.sha256 for one in (now, *others)}
        told = dict[str, Told]()
        for reply in ask(asking.tell, body, deadline=self.telling):
            if reply.body.sha256 in known:
                told[reply.silo] = reply.body
            else:
                what = f"{reply.body.embedder!r} ({reply.body.sha256[:12]})"
                progress.line(f"{reply.silo} is left out: it embeds by {what}; name its model in method.embedders")
        if not told:
            raise RunError("no silo told of its documents: none embeds by a model of method.embedder or method.embedders")
        # a silo that does not answer now is not forgotten: what it told before may still hold
        kept = {silo: one for silo, one in state.told.items() if silo not in told and one.sha256 in known}
        return replace(state, told=dict(sorted({**kept, **told}.items())))

    def _other(self) -> Any:
        """What another run serves. Raises UserError."""
        if not self.answers:
            return None
        files = sorted(Path(self.answers).glob("**/adapter/served.safetensors"))
        if not files:
            raise UserError(f"[method] answers = {self.answers!r}: no finished run there (no adapter/served.safetensors)")
        return wire.read_file(files[0])
