"""Rows in, answers out: tokens, batches, scores by log-probability, and greedy or sampled text, all batched.

Rows are padded on the left with explicit positions, so a row's numbers do not depend on its neighbours (fp32: up to
rounding). Rows that begin with the same tokens (a few-shot prompt, an instruction) share one pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedtailor import progress, seq2seq, vision
from fedtailor.data import Row
from fedtailor.errors import SiloError
from fedtailor.models import Resident, texts
from fedtailor.prefixes import Prefixes, common
from fedtailor.tuned import IGNORED, Batch, Tuned

SHARED = 24  # tokens in common from which one pass over them pays for cutting the rows in two
PLACES = 1024  # tokens of a scoring batch, padding included: measured best on a CPU (512 to 1024), its caches hold it


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: the prompt, then the answer."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(
    resident: Resident, rows: Sequence[Row], answers: Sequence[str] | None = None, *, stop: bool, taken: int = 0
) -> list[Encoded]:
    """Token ids of prompt and answer, joined by one space where the prompt does not end in white space.

    `stop` ends the answer with the end-of-text token (generation). `answers` replaces the rows' own. The two parts are
    tokenized apart, so the prompt's tokens are the same whatever the answer. Raises SiloError for a row longer than
    the model's context, of which `taken` places are a prefix's.
    """
    prompts, told = written(resident, rows, answers)
    if resident.kind == "seq2seq":
        return _encode_apart(resident, prompts, told, stop=stop, taken=taken)
    take = {"add_special_tokens": False}
    if not rows:
        return []
    begin = _begin(resident.tokenizer)
    encoded = [
        Encoded(
            ([] if row.messages else begin) + p or [resident.tokenizer.eos_token_id],  # a chat template writes its own
            a + [resident.tokenizer.eos_token_id] * stop,
        )
        for row, p, a in zip(
            rows, resident.tokenizer(prompts, **take).input_ids, resident.tokenizer(told, **take).input_ids, strict=True
        )
    ]
    for item in encoded:
        if len(item) > resident.context - taken:
            prefix = f" ({taken} of them virtual tokens)" if taken else ""
            raise SiloError(  # without the row's id, which is the silo's own: this may leave it
                f"a row has {len(item)} tokens ({len(item.answer)} of them answer), the model's context"
                f" is {resident.context}{prefix}"
            )
    return encoded


def written(resident: Resident, rows: Sequence[Row], answers: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Prompts and answers as the model reads them; a decoder's answer goes on from its prompt."""
    prompts = [texts(resident.tokenizer, row.messages) if row.messages else row.prompt for row in rows]
    told = [row.answer for row in rows] if answers is None else list(answers)
    if resident.kind != "seq2seq":
        told = [a if not p or p[-1].isspace() else f" {a}" for p, a in zip(prompts, told, strict=True)]
    return prompts, told


def _encode_apart(
    resident: Resident, prompts: Sequence[str], told: Sequence[str], *, stop: bool, taken: int
) -> list[Encoded]:
    """For an encoder-decoder: the prompt as its own tokenizer wants it; the answer is a text of its own."""
    if not prompts:
        return []
    end, room = [resident.tokenizer.eos_token_id], resident.context
    ids = resident.tokenizer(list(prompts)).input_ids
    answers = resident.tokenizer(list(told), add_special_tokens=False).input_ids
    items = [Encoded(p or end, a + end * stop) for p, a in zip(ids, answers, strict=True)]
    for item in items:
        if len(item.prompt) > room - taken or len(item.answer) > room:
            beside = f" beside {taken} virtual tokens" if taken else ""
            count = f"{len(item.prompt)} tokens{beside} and {len(item.answer)} of answer"
            raise SiloError(f"a row has {count}, the model's context is {room} of each")
    return items


def _begin(tokenizer: Any) -> list[int]:
    """The token that the model expects in front of every text, where its tokenizer puts one there."""
    first = tokenizer("").input_ids[:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def with_end(resident: Resident, labels: Sequence[str]) -> bool:
    """Whether label words are trained and scored with the end token: where one's tokens begin another's ("good",
    "goodness"), the shorter could never be the less likely one without it."""
    if resident.classifier:
        return False
    if resident.kind == "seq2seq":  # its answers always end, as they did in its own training
        return True
    for words in (labels, [f" {label}" for label in labels]):
        ids = sorted(resident.tokenizer(list(words), add_special_tokens=False).input_ids) if words else []
        if any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ids)):
            return True
    return False


def batch(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Left-padded, on the CPU; labels are the answers, aligned right: (B, longest answer)."""
    width, keep = max(map(len, items)), max(len(i.answer) for i in items)
    ids = torch.full((len(items), width), pad_id)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    labels = torch.full((len(items), keep), IGNORED)
    for i, item in enumerate(items):
        ids[i, width - len(item) :] = torch.tensor(item.prompt + item.answer)
        mask[i, width - len(item) :] = 1
        labels[i, keep - len(item.answer) :] = torch.tensor(item.answer)
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels)


def encode_classes(resident: Resident, rows: Sequence[Row], labels: Sequence[str], taken: int = 0) -> list[Encoded]:
    """For an encoder: the text as its own tokenizer wants it, cut to fit, and the label's index as the only 'answer'."""
    if not rows:
        return []
    room = resident.context - taken
    ids = resident.tokenizer([row.prompt for row in rows], truncation=True, max_length=room).input_ids
    return [Encoded(text, [labels.index(row.answer)]) for text, row in zip(ids, rows, strict=True)]


def class_batch(items: Sequence[Encoded], pad_id: int) -> Batch:
    """As `batch`, for an encoder: labels are (B,) classes and take no place in the text."""
    texts_only = batch([Encoded(item.prompt, []) for item in items], pad_id)
    classes = torch.tensor([item.answer[0] for item in items])
    return Batch(texts_only.input_ids, texts_only.attention_mask, texts_only.position_ids, classes)


def trainable(
    resident: Resident, rows: Sequence[Row], labels: Sequence[str], taken: int = 0
) -> tuple[list[Any], Callable[[Sequence[Any]], Batch]]:
    """Rows as items that have a length, and what makes a batch of some: as the base is trained on them."""
    if resident.kind == "vision":
        return vision.encode(resident, rows, labels), vision.batch
    if resident.classifier:
        return encode_classes(resident, rows, labels, taken), partial(class_batch, pad_id=resident.pad_id)
    stop = not labels or with_end(resident, labels)
    return encode(resident, rows, stop=stop, taken=taken), writing_batch(resident)


def writing_batch(resident: Resident) -> Callable[[Sequence[Encoded]], Batch]:
    if resident.kind == "seq2seq":
        return partial(seq2seq.batch, pad_id=resident.pad_id, start_id=seq2seq.start(resident.module))
    return partial(batch, pad_id=resident.pad_id)


@dataclass(frozen=True)
class Answers:
    """A model that answers: a resident base, what is on it, and the tensors that were learnt."""

    resident: Resident
    tuned: Tuned
    tensors: Mapping[str, Tensor] | None = None  # None: the base as it stands
    until: str = ""  # where this begins, generated text ends: what stands between few-shot examples
    told: Callable[[Row], Row] = lambda row: row  # how a row is asked: few-shot examples or an instruction in front
    said: Mapping[str, str] = field(default_factory=dict)  # label -> the word that stands for it, where it is another
    prefixes: Prefixes | None = None  # what batches begin with, kept from one to the next

    @torch.no_grad()
    def logprobs(
        self, rows: Sequence[Row], answers: Sequence[str] | None = None, *, stop: bool = True
    ) -> list[tuple[float, int]]:
        """For each row (log-probability in nats of its answer, number of its tokens); higher is likelier."""
        items = self._encoded(self._told(rows), answers, stop=stop)
        found: dict[int, tuple[float, int]] = {}
        for chosen in _by_length(items, "scoring"):
            some = self._batch([items[i] for i in chosen])
            totals, counts = _picked(self._answered(some), some.labels)
            for i, total, count in zip(chosen, totals.tolist(), counts.tolist(), strict=True):
                found[i] = (total, count)
        return [found[i] for i in range(len(items))]

    @torch.no_grad()
    def scores(self, rows: Sequence[Row], choices: Sequence[str]) -> Tensor:
        """(rows, choices) log-probabilities of each choice as the answer, fp32 on the CPU."""
        choices = [self.said.get(choice, choice) for choice in choices]
        if self.resident.classifier:
            return self._class_scores(rows, choices)
        if self.resident.kind == "seq2seq":
            return self._said_scores(rows, choices)
        alternatives = [self._encoded(self._told(rows), [choice] * len(rows)) for choice in choices]
        stop = with_end(self.resident, choices)  # then also where each is one token: what was trained is what is scored
        if stop or any(len(item.answer) != 1 for column in alternatives for item in column):
            flat = [self.logprobs(rows, [choice] * len(rows), stop=stop) for choice in choices]
            return torch.tensor([[total for total, _ in column] for column in flat]).T
        # every choice is one token: one pass over the prompt answers for all of them
        out = torch.zeros(len(rows), len(choices))
        prompts = [Encoded(item.prompt, []) for item in alternatives[0]]
        for chosen in _by_length(prompts, "scoring"):
            some = self._batch([prompts[i] for i in chosen])
            logp = self._logits(some, 1)[:, 0].float().log_softmax(-1).cpu()
            ids = torch.tensor([[column[i].answer[0] for column in alternatives] for i in chosen])
            out[torch.tensor(chosen)] = logp.gather(1, ids)
        return out

    def places(self, rows: Sequence[Row], choices: Sequence[str]) -> list[int]:
        """Tokens of each row's answer, one of `choices`, as `scores` counts them."""
        if self.resident.classifier:
            return [1] * len(rows)
        stop = with_end(self.resident, [self.said.get(choice, choice) for choice in choices])
        return [len(item.answer) for item in self._encoded(self._told(rows), None, stop=stop)]

    @torch.no_grad()
    def generate(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        begin: str = "",
    ) -> list[str]:
        """Text until the end token or `max_new_tokens`; greedy at temperature 0. `begin`: what all answers begin with, and is not
        returned; an encoder-decoder goes without."""
        items = self._asked(rows, begin)
        draw = torch.Generator().manual_seed(seed)
        texts_: dict[int, str] = {}
        for chosen in _by_length(items, "writing", max_new_tokens, 4):  # one token a row and step: more rows at once
            some = self._batch([items[i] for i in chosen])
            tokens = list(zip(*self._steps(some, max_new_tokens, temperature, top_p, draw), strict=True))
            for i, row in zip(chosen, tokens or [()] * len(chosen), strict=True):
                kept = row[: row.index(None)] if None in row else row
                text = self.resident.tokenizer.decode(list(kept), skip_special_tokens=True).strip()
                texts_[i] = text.split(self.until)[0].strip() if self.until else text
        return [texts_[i] for i in range(len(items))]

    def stream(
        self, row: Row, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, begin: str = ""
    ) -> Iterator[str]:
        """One answer, piece by piece as it is made: what `fedtailor chat` prints."""
        (item,) = self._asked([row], begin)
        draw, told, tokens = torch.Generator().manual_seed(seed), "", []
        with torch.no_grad():
            for step in self._steps(self._batch([item]), max_new_tokens, temperature, top_p, draw):
                if step[0] is None:
                    return
                tokens.append(step[0])
                text = self.resident.tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half a character: wait for the rest of its bytes
                    yield text[len(told) :]
                    told = text

    @property
    def _pad(self) -> int:
        return self.resident.pad_id

    def _batch(self, items: Sequence[Encoded]) -> Batch:
        return writing_batch(self.resident)(items).to(self.resident.device)

    def _told(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [self.told(row) for row in rows]

    def _encoded(self, rows: Sequence[Row], answers: Sequence[str] | None, *, stop: bool = False) -> list[Encoded]:
        return encode(self.resident, rows, answers, stop=stop, taken=self.tuned.shift)

    def _asked(self, rows: Sequence[Row], begin: str) -> list[Encoded]:
        told = self._encoded(self._told(rows), [""] * len(rows))
        more = self.resident.tokenizer(begin, add_special_tokens=False).input_ids if begin else []
        return [Encoded(item.prompt + more * (self.resident.kind != "seq2seq"), []) for item in told]

    def _class_scores(self, rows: Sequence[Row], choices: Sequence[str]) -> Tensor:
        asked = [replace(row, answer=choices[0]) for row in rows]
        items, make = trainable(self.resident, asked, choices, self.tuned.shift)
        out = torch.zeros(len(rows), len(choices))
        for chosen in _by_length(items, "scoring"):
            some = make([items[i] for i in chosen]).to(self.resident.device)
            logits = self.tuned.logits(self.tensors, some)
            out[torch.tensor(chosen)] = logits.float().log_softmax(-1).cpu()
        return out

    def _said_scores(self, rows: Sequence[Row], choices: Sequence[str]) -> Tensor:
        """Of an encoder-decoder: each prompt is read once, and every choice is said after it."""
        out = torch.zeros(len(rows), len(choices))
        columns = [self._encoded(self._told(rows), [choice] * len(rows), stop=True) for choice in choices]
        for chosen in _by_length(columns[0], "scoring"):
            read = None
            for number, column in enumerate(columns):
                some = self._batch([column[i] for i in chosen])
                words = some.input_ids, some.attention_mask, some.decoder_ids
                logits, _, read = self.tuned.using(self.tensors, *words, read)
                out[torch.tensor(chosen), number] = _picked(logits, some.labels)[0].float().cpu()
        return out

    def _answered(self, some: Batch) -> Tensor:
        """(B, K, V): what is said of each place of the labels."""
        if self.resident.kind == "seq2seq":
            return self.tuned.logits(self.tensors, some)
        return self._logits(some, some.labels.shape[1] + 1)[:, :-1]

    def _logits(self, some: Batch, keep: int) -> Tensor:
        """(B, keep, V). Tokens that begin every row are read once, and their cache is spread over the rows."""
        rows, width = some.input_ids.shape
        starts = [int(start) for start in (width - some.attention_mask.sum(1))]
        ids = [row[start:] for row, start in zip(some.input_ids.tolist(), starts, strict=True)]
        shared = min(_common(ids), min(map(len, ids)) - keep)
        if shared < SHARED or rows == 1:
            return self.tuned.using(self.tensors, some.input_ids, some.attention_mask, some.position_ids, keep)[0]  # type: ignore[no-any-return]
        cache = (self.prefixes or Prefixes()).cache(self.tuned, self.tensors, ids[0][:shared])
        cache.batch_repeat_interleave(rows)
        rest = batch([Encoded(row[shared:], []) for row in ids], self._pad).to(some.input_ids.device)
        ones = torch.ones(rows, shared, dtype=torch.long, device=rest.input_ids.device)
        mask = torch.cat([ones, rest.attention_mask], dim=1)
        return self.tuned.using(self.tensors, rest.input_ids, mask, rest.position_ids + shared, keep, cache)[0]  # type: ignore[no-any-return]

    def _steps(
        self, some: Batch, count: int, temperature: float, top_p: float, draw: torch.Generator
    ) -> Iterator[list[int | None]]:
        """One token per row and step; None once a row has ended, or has filled the context. Stops when all have."""
        ends = {self.resident.tokenizer.eos_token_id}
        more = self.resident.module.generation_config.eos_token_id
        ends |= set(more if isinstance(more, list) else [more])
        read, room = self.tuned.reading(self.tensors, some, self.resident.context)
        over, ids = [False] * len(room), None
        for step in range(count):
            nexts = _choose(read(ids).float().cpu(), temperature, top_p, draw).tolist()
            over = [done or token in ends for done, token in zip(over, nexts, strict=True)]
            yield [None if done else token for done, token in zip(over, nexts, strict=True)]
            over = [done or step >= free for done, free in zip(over, room, strict=True)]
            if all(over):
                return
            ids = torch.tensor(nexts, device=some.input_ids.device)[:, None]


def _picked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, V), (B, K) -> summed log-probabilities (fp64) and the number of labels of each row."""
    gone = labels == IGNORED
    picked = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(gone, 0)
    return picked.double().sum(1), (~gone).sum(1)


def _common(ids: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    return common(min(ids), max(ids))


def _choose(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> Tensor:
    """(B, V) -> (B,). Nucleus sampling keeps the fewest likeliest tokens that reach `top_p` (Holtzman et al. 2020)."""
    if temperature <= 0:
        return logits.argmax(-1)
    ranked, order = (logits / temperature).softmax(-1).sort(descending=True)
    ranked[:, 1:] = ranked[:, 1:].masked_fill((ranked.cumsum(-1) - ranked)[:, 1:] >= top_p, 0)  # the likeliest stays
    return order.gather(1, ranked.multinomial(1, generator=draw))[:, 0]


def _by_length(items: Sequence[Encoded], doing: str, extra: int = 0, times: int = 1) -> Iterable[list[int]]:
    """Indices in batches of like length, the longest first: little padding, and too large a batch shows at once."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    with progress.bar(doing, len(items)) as advance:
        while order:
            size = max(1, times * PLACES // (len(items[order[0]]) + extra))
            yield order[:size]
            for _ in order[:size]:
                advance()
            order = order[size:]


def fresh(resident: Resident, config: Any = None, classes: int = 0) -> Answers:
    """The base as it stands."""
    return Answers(resident, resident.tuned(config, classes))
