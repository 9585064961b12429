"""Knowledge distillation: silos with models of their own teach one student by what they say about public rows.

Each round every silo learns what all said of the last public rows, trains its own model on its own rows, and answers the
next public rows (FedMD, Li & Wang 2019); the server trains the student, [model], on the consensus (FedDF, Lin et al. 2020),
and the student may speak, too (FedCoLLM, Fan et al. 2024). Models never leave; `Spoken` says what does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor import consensus, distilling, models, progress, trainers, training
from fedtailor.answering import Answers, encode
from fedtailor.core import Ask, Method, Silo
from fedtailor.data import Row
from fedtailor.distilling import NO_IDS, Divergence, Pupil, Said
from fedtailor.errors import RunError, UserError, suggest
from fedtailor.evaluate import Counts
from fedtailor.methods import targets
from fedtailor.methods.averaging import Adapted, Averaging, Count, Positive, labels_of
from fedtailor.models import Base, Resident
from fedtailor.proxies import generated
from fedtailor.studying import Examine, Meet, Spoken, Study, examine, meet, study
from fedtailor.tuned import Tensors

TEXTS = "answers that silos write to public prompts leave them as text: a model may write what it learnt of private rows"


OF_THE_SERVER = frozenset(
    {"aggregate", "byzantine", "weigh", "scaffold", "max_delta_norm", "combine", "gap"}
    | {f.name for f in fields(Averaging) if f.name.startswith("server_")}
)
TRAINER = "how a model is trained stands in [method.trainer], or in [method.student] of the student"


@dataclass(frozen=True)
class State:
    """The server's: the student, and what is known of the public rows."""

    tensors: Tensors
    counts: tuple[int, ...]  # places of each public row
    heard: Said  # of all of their places, in order
    known: Tensor  # of which anyone spoke
    latest: tuple[int, ...]  # the rows of the last round
    labels: tuple[str, ...]
    order: int
    rows: tuple[Row, ...] = ()  # that the base wrote; else the server's public rows are asked about
    moments: Tensors = field(default_factory=dict)
    texts: tuple[tuple[int, tuple[str, ...]], ...] = ()  # of row i what silos wrote
    notes: Mapping[str, float] = field(default_factory=dict)


def _lora() -> dict[str, Any]:
    return {"name": "lora"}


@dataclass(frozen=True)
class Distill(Method[State]):
    """Settings. A trainer is a table as [method] of a method that averages: name, lr, local_steps, ..."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "encoder", "seq2seq")
    PER_SILO: ClassVar[frozenset[str]] = frozenset({"trainer", "model"})
    ELSEWHERE: ClassVar[Mapping[str, str]] = {f.name: TRAINER for f in fields(Averaging) if f.name not in OF_THE_SERVER}
    one_by_one: ClassVar[str] = "each silo may have a model of its own"
    BESIDES: ClassVar[str] = (
        "Of answers in text the shape is (tokens of the round's public answers, top). Besides: which public rows the silo holds "
        "itself, how far the public rows' tokens are from its own, two mean losses, rows seen; with consensus = 'familiar' how "
        "strange each public row's tokens are to it, by which a server can tell how often it has a word; with share = 'texts' "
        "an answer to each public row; at evaluation: sums and counts. No private rows, weights or gradients leave."
    )

    trainer: Mapping[str, Any] = field(default_factory=_lora)  # how a silo trains its model
    model: Base | None = None  # a silo's own, in [silo.NAME] model; None: [model], the student's
    student: Mapping[str, Any] = field(default_factory=dict)  # how the server trains the student; {}: as `trainer`
    public_rows: Count = 256  # of a round
    generated: Annotated[int, Field(ge=0)] = 0  # so many public rows are written by the base, going on with `generate`
    generate: str = ""  # such as "A review of a film: "
    share: Literal["logits", "texts"] = "logits"
    top: Count = 8  # of text: tokens of each place that leave a silo; of labels all do
    temperature: Positive = 1.0
    consensus: str = "mean"
    divergence: Divergence = "forward"
    digest_steps: Annotated[int, Field(ge=0)] = 4  # of a silo, on what all said of the last public rows
    student_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the student's own opinion in what goes back to silos
    truth: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the answers that public rows have, against what silos say
    align: bool = False  # of text: silos with another tokenizer translate what they say (FedMKT, Fan et al. 2025)

    def __post_init__(self) -> None:
        if bool(self.generated) != bool(self.generate.strip()):
            raise ValueError('generated and generate go together: how many rows, and what the base goes on with, as "A review: "')
        self.trains, self.teaches  # noqa: B018  both are checked
        if self.consensus not in consensus.names() and ":" not in self.consensus:
            raise ValueError(f"consensus = {self.consensus!r}: no such function{suggest(self.consensus, consensus.names())}")
        if self.share == "texts" and self.consensus != "mean":
            raise ValueError(f"consensus = {self.consensus!r}: is of logits; of texts the student learns every silo's")

    @property
    def needs_public(self) -> bool:
        return not self.generated

    @property
    def familiar(self) -> bool:
        """Whether silos are to say how strange each row is to them."""
        return self.consensus == consensus.familiar.__name__

    @property
    def warmup_rounds(self) -> float:
        return max(self.trains.warmup_rounds, self.teaches.warmup_rounds)

    @property
    def trains(self) -> Averaging:
        return _trainer(self.trainer, "trainer")

    @property
    def teaches(self) -> Averaging:
        return _trainer(self.student or self.trainer, "student")

    def ready(self, resident: Resident, silos: Mapping[str, Any]) -> None:
        """Raises UserError for whatever can be known to fail before a model is trained."""
        from fedtailor import preparing  # which knows of methods

        targets.claimed(self, resident)
        labels = max((len(rows.labels) for rows in silos.values()), default=0)
        self.teaches.put_on(resident, labels)
        if self.generated and (resident.classifier or not labels):
            raise UserError("[method] generated: texts to tell labels of; choose a causal base, and rows with labels")
        if labels and self.share == "texts":
            raise UserError('[method] share = "texts": is for answers of free text; labels are told by their probabilities')
        for name, rows in silos.items():
            mine = self.mine(rows.settings)
            try:
                base = mine.base(resident)
            except UserError as error:
                raise UserError(str(error).replace("[model]", f"[silo.{name}.model]", 1)) from error
            if base is not resident and base.kind not in self.FOR:
                raise UserError(f"[silo.{name}] model: {base.source} is a {base.kind} model; choose one of {', '.join(self.FOR)}")
            if base.classifier and not labels:
                raise UserError(f"[silo.{name}] model: {base.source} tells labels, it writes no text; choose a causal model")
            tuned = mine.trains.put_on(base, labels)
            preparing.fits(base, {name: rows}, taken=tuned.shift)
            if not labels and self.share == "logits" and not self.align and base.tokenizer_sha256 != resident.tokenizer_sha256:
                raise UserError(
                    f"[silo.{name}] model: its tokenizer is not the student's; set method.align = true, or method.share = 'texts'"
                )

    def suited(self, resident: Resident, public: Sequence[Row], labels: Sequence[str]) -> None:
        """Raises UserError for public rows that cannot be asked about."""
        if self.truth and not any(row.answer for row in public):
            raise UserError(f"[method] truth = {self.truth:g}: no public row has an answer; leave it out")
        if not labels and self.share == "logits" and not all(row.answer for row in public):
            raise UserError(
                "[data] public: silos speak at the tokens of each row's answer, and some have none: name rows with answers by "
                "public (public_fraction holds them out without), or set method.share = 'texts'"
            )
        if resident.classifier:
            return
        longest = max(labels, key=len, default="")
        asked = [replace(row, answer=row.answer or longest) for row in public]
        taken = self.teaches.put_on(resident, len(labels)).shift
        for number, ok in enumerate(distilling.fitting(resident, asked, taken), 1):
            if not ok:
                why = f"more tokens than the model's context of {resident.context}; shorten it, or set data.max_words"
                raise UserError(f"[data] public, row {number}: {why}")

    def mine(self, settings: Mapping[str, Any]) -> Distill:
        """With a silo's own settings."""
        known = {f.name for f in fields(self)}
        return replace(self, **{k: v for k, v in settings.items() if k in known})

    def base(self, resident: Resident) -> Resident:
        return resident if self.model is None else models.load(self.model)

    def begin(self, ask: Ask) -> State:
        resident = ask.here.models["base"]
        wrote = generated(ask.here, self.generated, self.generate) if self.generated else ()
        public = wrote or (ask.here.data.train if ask.here.data else ())
        if not public:
            raise UserError("[data] distillation needs public rows: set public to a file, or public_fraction")
        met = [reply.body for reply in ask(meet, Meet(self))]
        labels = met[0].labels
        if any(one.labels != labels for one in met):
            raise RunError("silos tell apart other labels: what they say cannot be one consensus")
        if self.share == "texts":
            progress.line(TEXTS)
        teaches = self.teaches
        tensors = teaches.initial(resident, teaches.put_on(resident, len(labels)), ask.here.seed)
        counts = [0] * len(public)
        if self.share == "logits":
            counts = distilling.places(resident, public, labels)
        wide = len(labels) or self.top
        heard = Said(torch.zeros(sum(counts), wide), NO_IDS if labels else torch.full((sum(counts), wide), -1, dtype=torch.int32))
        known = torch.zeros(sum(counts), dtype=torch.bool)
        return State(tensors, tuple(counts), heard, known, (), labels, ask.here.seed, wrote)

    def round(self, state: State, ask: Ask) -> State:
        rows = state.rows or ask.here.data.train
        chosen = self._chosen(len(rows), state.order, ask.round)
        past = tuple(rows[i] for i in state.latest)
        at = _places(state.counts, state.latest)
        body = Study(
            self, tuple(_bare(rows[i], self.share) for i in chosen), ask.round, ask.rounds, past,
            self._back(state, ask.here, past, at), state.known[at], _retold(state, rows),
            sum(state.counts[i] for i in chosen), state.heard.logp.shape[1],
            0 if state.labels else len(ask.here.models["base"].tokenizer),
        )  # fmt: skip
        replies = [reply.body for reply in ask(study, body)]
        state = self._written(state, chosen, replies) if self.share == "texts" else self._heard(state, chosen, replies)
        state, loss, steps = self._taught(state, ask)
        total = sum(r.rows for r in replies)
        notes = {
            "train_loss": math.fsum(r.loss * r.rows for r in replies) / max(total, 1),
            "student_loss": loss, "student_steps": float(steps), "declined_share": _declined(replies),
            "public_distance": statistics.fmean(r.distance for r in replies),
        }  # fmt: skip
        return replace(state, notes=notes, latest=tuple(chosen))

    def serve(self, state: State) -> Adapted:
        return Adapted(self.teaches, state.tensors, labels_of(state.tensors))

    def pooled(self, silos: int) -> Averaging:
        """A model of the student's size, trained on all rows in one place for as many steps as all silos take."""
        steps = self.trains.local_steps * silos
        return replace(self.teaches.pooled(1), local_steps=steps, batch_size=self.trains.batch_size)

    def solo(self, settings: Mapping[str, Any]) -> tuple[Averaging, Base | None]:
        """What a silo does by itself: its own model, trained as in a round."""
        mine = self.mine(settings)
        return mine.trains, mine.model

    def own(self, ask: Ask, split: str, max_new_tokens: int) -> dict[str, Counts]:
        """Each silo's own model on its own rows."""
        return {reply.silo: reply.body for reply in ask(examine, Examine(self, split, max_new_tokens))}

    def example(self, resident: Resident, labels: int, number: int = 1) -> Spoken:
        """A reply of a round; of text for answers of one token."""
        n, wide = self.public_rows, labels or self.top
        ids = NO_IDS if labels else torch.zeros(n, wide, dtype=torch.int32)
        says = Said(torch.zeros(n, wide, dtype=torch.float16), ids)
        flags = torch.ones(n, dtype=torch.bool)
        strange = torch.zeros(n, dtype=torch.float16) if self.familiar else torch.zeros(0)
        return Spoken(says, flags, flags, 1.2345678901234567, 1.2345678901234567, 64, 0.12345678901234567, strange=strange)

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """As the student's trainer does."""
        self.teaches.export(resident, tensors, folder)

    def pupil(self, resident: Resident, trainer: Averaging, labels: tuple[str, ...]) -> Pupil:
        tuned = trainer.put_on(resident, len(labels))
        return Pupil(resident, tuned, labels, self.divergence, self.temperature)

    def _chosen(self, count: int, order: int, number: int) -> list[int]:
        """The rows of a round: through all of them in one order, then again."""
        size = min(self.public_rows, count)
        every = torch.randperm(count, generator=torch.Generator().manual_seed(order % 2**63)).tolist()
        return sorted(every[(number * size + i) % count] for i in range(-size, 0))

    def _back(self, state: State, here: Silo, past: Sequence[Row], at: Tensor) -> Said:
        """What goes back to silos: the consensus, with the student's share."""
        heard = state.heard.at(at)
        if not self.student_share or not past or self.share == "texts":
            return heard
        resident, teaches = here.models["base"], self.teaches
        model = Answers(resident, teaches.put_on(resident, len(state.labels)), state.tensors)
        mine = distilling.said(model, past, state.labels, self.top, self.temperature)
        weights = torch.tensor([1 - self.student_share, self.student_share])

        def shared(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
            return (probs * weights[:, None, None]).sum(0)

        both = torch.ones(2, len(at), dtype=torch.bool)
        return distilling.united([heard, mine], self.top, shared, both, torch.zeros(both.shape))[0]

    def _heard(self, state: State, chosen: Sequence[int], replies: Sequence[Spoken]) -> State:
        at = _places(state.counts, chosen)
        sizes, spoken = torch.tensor([state.counts[i] for i in chosen]), torch.stack([r.spoken for r in replies])
        losses = torch.tensor([r.val_loss for r in replies])[:, None].expand(spoken.shape)
        if self.familiar:
            losses = torch.stack([r.strange.float().repeat_interleave(sizes) for r in replies])
        way = consensus.find(self.consensus)
        whole, known = distilling.united([r.said for r in replies], self.top, way, spoken, losses)
        held = torch.stack([r.held for r in replies]).any(0)
        taken = held.repeat_interleave(sizes)  # of what a silo holds nobody learns
        logp, ids, all_known = state.heard.logp.clone(), state.heard.ids.clone(), state.known.clone()
        all_known[at] = (known | state.known[at]) & ~taken
        logp[at] = torch.where(known[:, None], whole.logp, state.heard.logp[at])  # nobody spoke this time: what is known stays
        if ids.numel():
            ids[at] = torch.where(known[:, None], whole.ids, state.heard.ids[at])
        return replace(state, heard=Said(logp, ids), known=all_known)

    def _written(self, state: State, chosen: Sequence[int], replies: Sequence[Spoken]) -> State:
        told = dict(state.texts)
        held = torch.stack([r.held for r in replies]).any(0).tolist()
        for place, i in enumerate(chosen):
            texts = tuple(text for r in replies if (text := r.texts[place].strip()))
            told[i] = () if held[place] else texts or told.get(i, ())
        return replace(state, texts=tuple(sorted(told.items())))

    def _taught(self, state: State, ask: Ask) -> tuple[State, float, int]:
        """The student after its steps of this round; their mean loss, and how many they were."""
        resident, rows, seed = ask.here.models["base"], state.rows or ask.here.data.train, ask.here.seed
        teaches = self.teaches
        pupil = self.pupil(resident, teaches, state.labels)
        how = teaches.local(teaches.lrs(ask.round, ask.rounds))
        moments = state.moments if teaches.optimizer_state == "keep" else {}
        lessons, told = None, list[Row]()
        if self.share == "texts":
            told = [row for some in _retold(replace(state, latest=tuple(i for i, _ in state.texts)), rows) for row in some]
        else:
            lessons = pupil.lessons(rows, self._true(state, rows, resident), state.known, state.counts, how, seed)
        done = pupil.learn(state.tensors, how, moments, seed, lessons, told)
        if done is None:
            return state, math.nan, 0
        if done.failed[0] is not None:
            raise RunError(f"round {ask.round}: the student: {done.failed[0]}".replace("method.lr", "the student's lr"))
        kept = training.moments_of(done, 0) if teaches.optimizer_state == "keep" else {}
        tensors = {n: t[0].cpu() for n, t in done.tensors.items()}
        return replace(state, tensors=tensors, moments=kept), done.loss[0], len(how.lrs)

    def _true(self, state: State, rows: Sequence[Row], resident: Resident) -> Said:
        """What silos say, with `truth` of the answers that the rows have."""
        if not self.truth:
            return state.heard
        if not state.labels:
            true = [t for item in encode(resident, rows, stop=True) for t in item.answer]
            return distilling.blended(state.heard, torch.tensor(true, dtype=torch.int32), self.truth)
        probs = state.heard.whole().exp()
        for i, row in enumerate(rows):
            if row.answer in state.labels:
                right = torch.eye(len(state.labels))[state.labels.index(row.answer)]
                probs[i] = (1 - self.truth) * probs[i] + self.truth * right
        return Said(probs.clamp(min=distilling.LEAST).log(), NO_IDS)


def _trainer(table: Mapping[str, Any], what: str) -> Averaging:
    return trainers.named(table, what, OF_THE_SERVER, "is for a server that averages changes, and here none does")


def _places(counts: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Where the places of these rows stand among those of all."""
    ends = torch.tensor(counts, dtype=torch.long).cumsum(0)
    return torch.cat([torch.arange(int(ends[i]) - counts[i], int(ends[i])) for i in rows]) if rows else torch.zeros(0).long()


def _bare(row: Row, share: str) -> Row:
    """A public row as it goes to silos: without its answer, where they are to write one."""
    return replace(row, id="", answer="" if share == "texts" else row.answer)


def _retold(state: State, rows: Sequence[Row]) -> tuple[tuple[Row, ...], ...]:
    """The last public rows as silos answered them."""
    told = dict(state.texts)
    return tuple(tuple(replace(rows[i], id="", answer=text) for text in told.get(i, ())) for i in state.latest)


def _declined(replies: Sequence[Spoken]) -> float:
    """The mean share of a round's rows that a silo holds itself."""
    return statistics.fmean(float(r.held.float().mean()) for r in replies)
