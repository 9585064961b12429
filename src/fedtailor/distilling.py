"""What a model says about rows that all may read, as numbers that cross; and training on what others said of them.

Of labels a place is a row, and what is said of it is the log-probability of each label. Of text a place is a token of the
row's answer, and what is said are the likeliest tokens; all others are one more outcome, "the rest", so that nobody sends a
vocabulary. Hinton et al. 2015; of many models over public rows: FedMD (Li & Wang 2019), FedDF (Lin et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fedtailor import training
from fedtailor.answering import PLACES, Answers, encode, trainable, with_end, writing_batch
from fedtailor.data import Row, SiloData
from fedtailor.errors import SiloError
from fedtailor.models import Resident
from fedtailor.training import Local
from fedtailor.tuned import IGNORED, Batch, Tensors, Tuned

Divergence = Literal["forward", "reverse", "js"]
NO_IDS = torch.zeros(0, 0, dtype=torch.int32)
LEAST = 1e-6  # of a probability: fp16 log-probabilities add up to 1 within about as much


@dataclass(frozen=True)
class Said:
    """What is said of P places, rows in order, in nats. Crosses the wire."""

    logp: Tensor  # (P, k)
    ids: Tensor  # (P, k) int32 tokens of the student's tokenizer, -1: none; (0, 0) of labels, which are the columns

    def at(self, places: Tensor) -> Said:
        return Said(self.logp[places], self.ids[places] if self.ids.numel() else self.ids)

    def whole(self) -> Tensor:
        """(P, k) of labels, (P, k + 1) of text, whose last is the rest: log-probabilities, fp32."""
        logp = self.logp.float()
        return with_rest(logp) if self.ids.numel() else logp.log_softmax(-1)  # rounding is taken out


def with_rest(logp: Tensor) -> Tensor:
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([logp, rest], dim=-1).log_softmax(-1)


def places(resident: Resident, rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
    """How many places each row has."""
    return [1] * len(rows) if labels else [len(item.answer) for item in encode(resident, rows, stop=True)]


def fitting(resident: Resident, rows: Sequence[Row], taken: int) -> list[bool]:
    """Which of these rows are within the model's context, answer and end included, beside `taken` virtual tokens."""
    found = []
    for row in rows:
        try:
            encode(resident, [row], stop=True, taken=taken)
            found.append(True)
        except SiloError:
            found.append(False)
    return found


@torch.no_grad()
def said(model: Answers, rows: Sequence[Row], labels: Sequence[str], top: int, temperature: float) -> Said:
    """What the model says of these rows: of each label, or of the `top` likeliest tokens of each place."""
    if labels:
        scores = model.scores([replace(row, answer=labels[0]) for row in rows], labels)
        return Said((scores / temperature).log_softmax(-1), NO_IDS)
    resident, found = model.resident, dict[int, tuple[Tensor, Tensor]]()
    items = encode(resident, rows, stop=True, taken=model.tuned.shift)
    make = writing_batch(resident)
    for chosen in _alike([len(item) for item in items]):
        batch = make([items[i] for i in chosen]).to(resident.device)
        logits = _told(model.tuned.logits(model.tensors, batch), batch)
        logp, ids = (logits / temperature).log_softmax(-1).topk(min(top, logits.shape[-1]))
        sizes = [len(items[i].answer) for i in chosen]
        for i, one, tokens in zip(chosen, logp.cpu().split(sizes), ids.cpu().split(sizes), strict=True):
            found[i] = one, tokens
    if not rows:
        return Said(torch.zeros(0, top), torch.zeros(0, top, dtype=torch.int32))
    logps, tokens = zip(*(found[i] for i in range(len(items))), strict=True)
    return Said(torch.cat(logps), torch.cat(tokens).int())


def divergence(kind: Divergence, theirs: Tensor, mine: Tensor) -> Tensor:
    """(P, C), (P, C) log-probabilities -> (P,) nats, 0 where they agree. forward: KL(theirs || mine), covers all that they say;
    reverse: KL(mine || theirs), keeps to what they find likely; js: Jensen-Shannon, between the two and at most ln 2."""
    if kind == "forward":
        return _kl(theirs, mine)
    if kind == "reverse":
        return _kl(mine, theirs)
    middle = torch.logaddexp(theirs, mine) - torch.log(torch.tensor(2.0))
    return (_kl(theirs, middle) + _kl(mine, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class Lesson:
    """Some public rows as a batch, and what is to be said of their P places."""

    batch: Batch
    said: Said
    weight: Tensor  # (P,) 0 for a place that nobody spoke of

    def to(self, device: torch.device) -> Lesson:
        moved = Said(self.said.logp.to(device), self.said.ids.to(device))
        return Lesson(self.batch.to(device), moved, self.weight.to(device))


@dataclass(frozen=True)
class Pupil:
    """A base with what is trained on it, where the loss is the divergence from what others said: `training.train` takes it in
    place of a `Tuned`. A temperature T softens both sides, and T^2 keeps the gradient's size (Hinton et al. 2015)."""

    resident: Resident
    tuned: Tuned
    labels: tuple[str, ...]
    kind: Divergence = "forward"
    temperature: float = 1.0

    @property
    def shift(self) -> int:
        return self.tuned.shift

    def dropping(self, seed: int) -> Any:
        return self.tuned.dropping(seed)

    def losses(self, tensors: Mapping[str, Tensor] | None, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """The summed divergence times T^2, and over how many places. A model that writes learns besides that what it says is a
        label at all: with T = 1 both together are KL(theirs || its words), over all that it could have said."""
        logits = self._logits(tensors, lesson.batch)
        mine = (logits / self.temperature).log_softmax(-1)
        if not self.labels:
            ids = lesson.said.ids.long()
            mine = with_rest(mine.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf))
        theirs = lesson.said.whole()
        if not self.labels:  # where there is no token there is nothing to tell: 0 * (-inf) would be none
            gone = torch.cat([ids < 0, torch.zeros_like(ids[:, :1], dtype=torch.bool)], 1)
            mine, theirs = mine.masked_fill(gone, -30.0), theirs.masked_fill(gone, -30.0)
        each = divergence(self.kind, theirs, mine) * self.temperature**2
        if self.labels and not self.resident.classifier:
            each = each - logits.logsumexp(-1)
        return (each * lesson.weight).sum(), lesson.weight.sum()

    def _logits(self, tensors: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        """(P, vocabulary) of text; of labels (P, labels), which of a model that writes are log-probabilities of the words."""
        tuned = self.tuned
        if self.resident.classifier:
            return tuned.logits(tensors, batch).float()
        if not self.labels:
            return _told(tuned.logits(tensors, batch), batch)
        if (ids := self._words) is not None:  # each label is one token: one pass answers for all
            last = tuned.using(tensors, batch.input_ids, batch.attention_mask, batch.position_ids, 1)[0][:, -1]
            return last.float().log_softmax(-1)[:, ids.to(last.device)]  # type: ignore[no-any-return]
        # (rows * labels, K): each row with each label said after it
        logp = tuned.logits(tensors, batch).float().log_softmax(-1)
        gone = batch.labels == IGNORED
        picked = logp.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0].masked_fill(gone, 0)
        return picked.sum(1).view(-1, len(self.labels))

    @cached_property
    def _words(self) -> Tensor | None:
        """The token of each label; None where one has several."""
        if self.resident.kind == "seq2seq" or with_end(self.resident, self.labels):
            return None
        ids = [item.answer for item in encode(self.resident, [Row("x", label) for label in self.labels], stop=False)]
        return torch.tensor([one[0] for one in ids]) if all(len(one) == 1 for one in ids) else None

    def lessons(
        self, rows: Sequence[Row], heard: Said, known: Tensor, counts: Sequence[int], how: Local, seed: int
    ) -> list[list[Lesson]]:
        """The batches of all steps, drawn without replacement until there are no more rows, then anew; those without a place
        that is known are never drawn. `counts`: places of each row."""
        size, passes = how.batch_size, len(how.lrs) * how.accumulate
        ends = torch.tensor(counts).cumsum(0).tolist()
        spans = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        usable = [i for i, span in enumerate(spans) if bool(known[span].any())]
        dice, order = torch.Generator().manual_seed(seed % 2**63), list[int]()
        while usable and len(order) < passes * size:
            order += [usable[i] for i in torch.randperm(len(usable), generator=dice).tolist()]
        found = []
        for begin in range(0, len(order[: passes * size]), size):
            chosen = order[begin : begin + size]
            at = torch.cat([spans[i] for i in chosen])
            found.append(Lesson(self._batch([rows[i] for i in chosen]), heard.at(at), known[at].float()))
        return [found[i : i + how.accumulate] for i in range(0, len(found), how.accumulate)]

    def learn(
        self, start: Tensors, how: Local, moments: Mapping[str, Tensor], seed: int,
        lessons: list[list[Lesson]] | None, told: Sequence[Row],
    ) -> training.Outcome | None:  # fmt: skip
        """Training from `start` on lessons, or, where these are None, on rows as they were answered in text, those that fit the
        context: an answer may be any length. None: there is nothing to learn from."""
        taught: Any = self if lessons is not None else self.tuned
        fits = fitting(self.resident, told, self.shift)
        data = SiloData(tuple(row for row, ok in zip(told, fits, strict=True) if ok), (), ())
        if not (lessons or data.train):
            return None
        drawn = None if lessons is None else [lessons]
        return training.train(self.resident, taught, start, [(data, seed)], how, [moments], drawn=drawn)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        resident, labels, taken = self.resident, self.labels, self.shift
        if not labels or self.resident.classifier:
            asked = [replace(row, answer=labels[0]) for row in rows] if labels else rows
            items, make = trainable(resident, asked, labels, taken)
            return make(items)
        if self._words is not None:
            prompts = encode(resident, [replace(row, answer="") for row in rows], stop=False, taken=taken)
            return writing_batch(resident)([replace(item, answer=[]) for item in prompts])
        stop = with_end(resident, labels)
        each = [replace(row, answer=label) for row in rows for label in labels]
        return writing_batch(resident)(encode(resident, each, stop=stop, taken=taken))


def _told(logits: Tensor, batch: Batch) -> Tensor:
    """(B, K, V) -> (P, V), fp32: those of places that have a label, row by row."""
    return logits[batch.labels != IGNORED].float()


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, PLACES // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def blended(heard: Said, true: Tensor, share: float) -> Said:
    """What is said of text, with `share` of the probability given to the true tokens, (P,) int32. One that was not among the
    likeliest takes the place of the last."""
    ids, probs = heard.ids.clone(), heard.logp.float().exp().masked_fill(heard.ids < 0, 0.0)
    missing = ~(ids == true[:, None]).any(1)
    ids[missing, -1], probs[missing, -1] = true[missing], 0.0
    probs = (1 - share) * probs + share * (ids == true[:, None])
    return Said(probs.clamp(min=1e-12).log(), ids)


Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def united(heard: Sequence[Said], top: int, way: Way, spoken: Tensor, losses: Tensor) -> tuple[Said, Tensor]:
    """What S silos said of the same P places as one, and of which places anyone spoke. `spoken`: (S, P) bool; `losses`: (S, P).

    Of text, each silo has its own likeliest tokens: one that it does not name is in its rest, and counts as 0."""
    if not heard[0].ids.numel():
        told = torch.stack([one.whole().exp() for one in heard])
        told = told.masked_fill(~spoken[..., None], 1 / told.shape[-1])  # what a silo does not speak of may be anything
        return Said(way(told, spoken, losses).log(), heard[0].ids), spoken.any(0)
    every = torch.cat([one.ids.long() for one in heard], 1).sort(1).values  # (P, S k)
    again = torch.cat([torch.zeros_like(every[:, :1], dtype=torch.bool), every[:, 1:] == every[:, :-1]], 1)
    every = every.masked_fill(again, -1)
    probs = []
    for one in heard:
        same = (every[:, :, None] == one.ids.long()[:, None, :]) & (every >= 0)[:, :, None]  # (P, U, k)
        mine = (same * one.logp.float().exp()[:, None, :].nan_to_num(0.0)).sum(-1)
        probs.append(torch.cat([mine, (1 - mine.sum(1, keepdim=True)).clamp(min=LEAST)], 1))
    whole = way(torch.stack(probs), spoken, losses)[:, :-1].masked_fill(every < 0, 0.0)
    best = whole.topk(min(top, whole.shape[1]))
    ids = every.gather(1, best.indices)
    return Said(best.values.clamp(min=1e-12).log(), ids.masked_fill(best.values <= 0, -1).int()), spoken.any(0)
