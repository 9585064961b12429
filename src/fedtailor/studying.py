"""The silo's side of distillation: learn what all said, train on rows of its own, speak of public rows. No model leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtailor import aligning, distilling, training
from fedtailor.answering import Answers, written
from fedtailor.core import Ask, Silo, in_silo
from fedtailor.data import Row
from fedtailor.distilling import NO_IDS, Said
from fedtailor.errors import SiloError
from fedtailor.evaluate import Counts, Evaluate, evaluate_many
from fedtailor.models import Resident
from fedtailor.proxies import distance, strangeness
from fedtailor.rows import digest
from fedtailor.tuned import Tensors

if TYPE_CHECKING:
    from fedtailor.methods.averaging import Averaging
    from fedtailor.methods.distill import Distill

_TABLES: dict[tuple[str, str], aligning.Vocabulary] = {}  # of public vocabularies: nothing of any silo's
STRANGE = 100.0  # nats of a token: more than any vocabulary can ask for
WRITES = 64  # tokens of an answer at most, where silos answer in text


@dataclass(frozen=True)
class Meet:
    """Down, once: what silos will be asked."""

    method: Distill


@dataclass(frozen=True)
class Met:
    """Up: the label words, of a silo whose model could be loaded and trained. No row is read."""

    labels: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """Down, each round: what all said of the last rows, the learning rates, and the next public rows."""

    method: Distill
    rows: tuple[Row, ...]
    number: int  # of the round
    rounds: int
    past: tuple[Row, ...] = ()
    heard: Said = field(default_factory=lambda: Said(torch.zeros(0, 0), NO_IDS))  # of `past`
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # of which of its places anyone spoke
    texts: tuple[tuple[Row, ...], ...] = ()  # share = "texts": `past` as each silo answered it
    places: int = 0  # of `rows`, in the student's tokens
    outcomes: int = 0  # said of each: the labels, or the likeliest tokens
    tokens: int = 0  # of the student's vocabulary; 0: of labels none are told


@dataclass(frozen=True)
class Spoken:
    """Up: what this silo's model says of the public rows; of private ones two mean losses, and how far the public ones are.

    It says which public rows it holds itself, in whichever split: nobody then learns from these. A model's opinion of
    public rows can tell of the rows it was trained on, as a gradient can: this is no anonymity. `strange` is more: who
    chooses the public rows can read from it how often a silo's own rows have a word.
    """

    said: Said  # fp16
    spoken: Tensor  # (P,) bool
    held: Tensor  # (rows,) bool: which of the public rows it holds itself
    loss: float  # mean, of training
    val_loss: float  # of validation rows, where consensus = "validation" asks for it; else of training
    rows: int  # trained on this round
    distance: float = 0.0  # of the public rows from its own, see `proxies.distance`
    texts: tuple[str, ...] = ()  # share = "texts": an answer to each row, "" to one it does not speak of
    strange: Tensor = field(default_factory=lambda: torch.zeros(0))  # (rows,) fp16; of consensus = "familiar"

    def problem(self, asked: Study) -> str | None:
        """Why this must not be used, or None."""
        if not (math.isfinite(self.loss) and math.isfinite(self.val_loss)):
            return "a loss is not finite: lower the trainer's lr"
        if not 0 <= self.distance <= 1:
            return f"a distance of {self.distance}"
        if self.held.shape != (len(asked.rows),) or self.held.dtype != torch.bool:
            return f"says of {tuple(self.held.shape)} of {len(asked.rows)} rows whether it holds them"
        strange = self.strange.float()
        told = strange.shape == self.held.shape and bool(((strange >= 0) & (strange < STRANGE)).all())
        if asked.method.familiar and not told:
            return f"says of {tuple(strange.shape)} of {len(asked.rows)} rows how strange they are, from 0 to {STRANGE:g} nats"
        if asked.method.share == "texts":
            return None if len(self.texts) == len(asked.rows) else f"{len(self.texts)} answers to {len(asked.rows)} rows"
        logp = self.said.logp.float()
        size = (asked.places, asked.outcomes)
        if logp.shape != size or self.spoken.shape != size[:1] or self.spoken.dtype != torch.bool:
            return f"says {tuple(logp.shape)}, of {tuple(self.spoken.shape)} whether: asked {size}"
        if (ids := self.said.ids).shape != (size if asked.tokens else (0, 0)) or ids.dtype != torch.int32:
            return f"tokens {tuple(ids.shape)} of {ids.dtype}: asked {size if asked.tokens else 'none'}"
        if asked.tokens and (bool((ids < -1).any()) or bool((ids >= asked.tokens).any()) or _twice(ids)):
            return "tokens that the student has not, or one of them twice at a place"
        if not bool(logp[self.spoken].isfinite().all()):
            return "log-probabilities are not finite"
        if bool((logp > 0.01).any()) or bool((logp[self.spoken].exp().sum(1) > 1.02).any()):
            return "probabilities add up to more than 1"
        return None


@in_silo(memory=False)
def meet(silo: Silo, body: Meet) -> Met:
    mine = body.method.mine(silo.data.settings)
    base = mine.base(silo.models["base"])
    mine.trains.put_on(base, len(silo.data.labels))
    return Met(silo.data.labels)


@in_silo
def study(silo: Silo, body: Study) -> Spoken:
    mine, labels, number = body.method.mine(silo.data.settings), silo.data.labels, body.number
    trainer, base = mine.trains, mine.base(silo.models["base"])
    tuned = trainer.put_on(base, len(labels))
    own = silo.memory.get("own") or trainer.initial(base, tuned, silo.seed)
    kept = silo.memory if trainer.optimizer_state == "keep" else {}
    own, moments = _digested(mine, trainer, base, silo, body, own, kept.get("digested", {}))
    if trainer.optimizer_state == "keep":
        silo.memory["digested"] = moments
    how = trainer.local(trainer.lrs(number, body.rounds))
    done = training.train(base, tuned, own, [(silo.data, silo.seed)], how, [kept.get("moments", {})])
    if done.failed[0] is not None:
        raise SiloError(done.failed[0].replace("method.lr", "the trainer's lr"))
    if trainer.optimizer_state == "keep":
        silo.memory["moments"] = training.moments_of(done, 0)
    silo.memory["own"] = {n: t[0].cpu() for n, t in done.tensors.items()}
    model = Answers(base, tuned, silo.memory["own"])
    seen = len(how.lrs) * how.batch_size * how.accumulate
    val_loss = done.loss[0]
    if body.method.consensus == "validation" and silo.data.val:
        counts = _examined(silo, model, "val", 1, generate=False)
        val_loss = counts.nll / max(counts.places, 1)
    apart = distance(silo.models["base"].tokenizer, body.rows, silo.data.train)
    mine_all = {_content(row) for part in (silo.data.train, silo.data.val, silo.data.test) for row in part}
    free = [_content(row) not in mine_all for row in body.rows]
    held = ~torch.tensor(free, dtype=torch.bool)
    if body.method.share == "texts":
        texts = iter(model.generate([row for row, ok in zip(body.rows, free, strict=True) if ok], max_new_tokens=WRITES))
        told = tuple(next(texts) if ok else "" for ok in free)
        nothing = Said(torch.zeros(0, 0), NO_IDS)
        return Spoken(nothing, torch.zeros(0, dtype=torch.bool), held, done.loss[0], val_loss, seen, apart, told)
    says, spoken = _spoken(mine, silo, model, body.rows, free)
    says = Said(says.logp.clamp(min=-60.0).half(), says.ids)
    strange = torch.zeros(0)
    if body.method.familiar:
        strange = strangeness(silo.models["base"].tokenizer, body.rows, silo.data.train).half()
    return Spoken(says, spoken, held, done.loss[0], val_loss, seen, apart, strange=strange)


def _twice(ids: Tensor) -> bool:
    ranked = ids.sort(1).values
    return bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any())


@dataclass(frozen=True)
class Examine:
    """Down: on which of its rows a silo is to try its own model."""

    method: Distill
    split: str
    max_new_tokens: int


@in_silo
def examine(silo: Silo, body: Examine) -> Counts:
    mine = body.method.mine(silo.data.settings)
    base = mine.base(silo.models["base"])
    if "own" not in silo.memory:
        raise SiloError("it has no model of its own yet: it took part in no round")
    model = Answers(base, mine.trains.put_on(base, len(silo.data.labels)), silo.memory["own"])
    return _examined(silo, model, body.split, body.max_new_tokens, generate=True)


@dataclass(frozen=True)
class _Opened:
    """A model that is open already, as `evaluate` wants it."""

    model: Answers

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Answers:
        return self.model


def _examined(silo: Silo, model: Answers, split: str, max_new_tokens: int, generate: bool) -> Counts:
    return evaluate_many([silo], Evaluate(_Opened(model), split, max_new_tokens, generate))[0]


def _digested(
    mine: Distill, trainer: Averaging, base: Resident, silo: Silo, body: Study, own: Tensors, moments: Tensors
) -> tuple[Tensors, Tensors]:
    """The silo's model after learning what all said of the last public rows."""
    steps, labels = body.method.digest_steps, silo.data.labels
    lrs = tuple(trainer.lrs(body.number, body.rounds)[0] for _ in range(steps))
    if not steps or not body.past:
        return own, moments
    how, pupil = trainer.local(lrs), mine.pupil(base, trainer, labels)
    lessons, seed = None, silo.seed + 1
    if body.method.share == "logits":
        heard, known, counts = _heard(silo, base, body)
        lessons = pupil.lessons(body.past, heard, known, counts, how, seed)
    done = pupil.learn(own, how, moments, seed, lessons, [row for some in body.texts for row in some])
    if done is None:
        return own, moments
    if done.failed[0] is not None:
        raise SiloError(f"learning from the others: {done.failed[0]}".replace("method.lr", "the trainer's lr"))
    return {n: t[0].cpu() for n, t in done.tensors.items()}, training.moments_of(done, 0)


def _spoken(mine: Distill, silo: Silo, model: Answers, rows: Sequence[Row], free: Sequence[bool]) -> tuple[Said, Tensor]:
    """What the silo's model says, at the student's places, and of which of them it speaks."""
    labels, student, base = silo.data.labels, silo.models["base"], model.resident
    says = distilling.said(model, rows, labels, mine.top, mine.temperature)
    counts = distilling.places(student, rows, labels)
    spoken = torch.tensor(free, dtype=torch.bool).repeat_interleave(torch.tensor(counts))
    if labels or base.tokenizer_sha256 == student.tokenizer_sha256:
        return says, spoken
    if not mine.align:
        raise SiloError("its tokenizer is not the student's: set method.align = true, or method.share = 'texts'")
    says, told = translated(says, rows, base, student)
    return says, spoken & told


def _heard(silo: Silo, base: Resident, body: Study) -> tuple[Said, Tensor, list[int]]:
    """What all said of the last rows at the places of the silo's own tokenizer, of which anyone spoke, and how many a row has."""
    labels, student = silo.data.labels, silo.models["base"]
    counts = distilling.places(base, body.past, labels)
    if labels or base.tokenizer_sha256 == student.tokenizer_sha256:
        return body.heard, body.known, counts
    heard, spoken = translated(body.heard, body.past, student, base, body.known)
    return heard, spoken, counts


def translated(
    says: Said, rows: Sequence[Row], mine: Resident, theirs: Resident, known: Tensor | None = None
) -> tuple[Said, Tensor]:
    """What is said with `mine`'s tokens at its places, with `theirs` tokens at theirs; and at which of those it is said: where a
    token of each begins at the same letter, or both end."""
    table = _table(mine, theirs)
    at, whole, begin = list[int](), list[bool](), 0
    for row in rows:
        one, other = _spans(mine, row), _spans(theirs, row)
        at += [begin + i for i in aligning.places(one, other)]
        whole += aligning.whole(one, other)
        begin += len(one)
    places = torch.tensor(at, dtype=torch.long)
    ids, logp = aligning.projected(says.ids[places].long(), says.logp[places].float(), table)
    spoken = torch.tensor(whole, dtype=torch.bool) & (ids >= 0).any(1)
    return Said(logp, ids.int()), spoken if known is None else spoken & known[places]


def _table(mine: Resident, theirs: Resident) -> aligning.Vocabulary:
    """Made once a pair: its looking up takes up to 0.1 s for each token that it meets for the first time."""
    key = mine.tokenizer_sha256, theirs.tokenizer_sha256
    if key not in _TABLES:
        _TABLES[key] = aligning.Vocabulary(mine.tokenizer, theirs.tokenizer)
    return _TABLES[key]


def _spans(resident: Resident, row: Row) -> list[tuple[int, int]]:
    """Where each token of the row's answer stands in it, and the end."""
    (answer,) = written(resident, [row])[1]
    _, spans = aligning.spans(resident.tokenizer, answer)
    lead = len(answer) - len(row.answer)  # of one model the answer goes on from the prompt, of the other it may not
    return [*((begin - lead, end - lead) for begin, end in spans), (len(row.answer), len(row.answer))]


def _content(row: Row) -> str:
    """What makes a row the same as another: what is asked, without the template's words around it and the answer."""
    return digest(" ".join(row.input.split()), row.messages)
