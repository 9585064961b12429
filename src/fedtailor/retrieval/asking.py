"""What a silo with documents answers: how its words are spread, which passages score, and, of those that won, what it lets out.

Questions come as vectors and numbers of words; only a silo that answers by itself ("answers") is told the text. Scores leave
first, then passages of the winners alone, under the silo's policy.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.core import Silo, in_silo
from fedtailor.errors import SiloError, UserError
from fedtailor.retrieval import embedding, routing, scoring, writing
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.corpus import Corpus, base_name
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.policy import Policy, cited, counted, let_out
from fedtailor.retrieval.redaction import redacted
from fedtailor.retrieval.scoring import Found, Question

log = logging.getLogger("fedtailor.silo")
MOST = 1000  # candidates of a question, and passages that one request may name
NAME, TEXT = 2_000, 50_000  # letters of a name or heading, and of a passage
QUESTION = 2_000  # letters


@dataclass(frozen=True)
class Words:
    """The hashed words of questions, one after the other."""

    terms: Tensor  # (n,) int64
    weights: Tensor  # (n,) float64
    ends: Tensor  # (questions,) int32: where each one's stop

    def of(self, i: int) -> dict[int, float]:
        begin, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return dict(zip(self.terms[begin:end].tolist(), self.weights[begin:end].tolist(), strict=True))


@dataclass(frozen=True)
class Tell:
    """Down, before any question: by which embedder all search, and what is asked for routing."""

    embedder: str
    sha256: str  # of what it was trained from, where it was
    wanted: str  # of it as it is now: what silos say that they search by
    trainer: Mapping[str, Any] = field(default_factory=dict)  # how the embedder was trained, as [method.trainer]; {}: it was not
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    centroids: int = 0  # at most; 0: no routing
    any_embedder: bool = False  # each silo may have one of its own: ranks are fused, not scores
    approximate: bool = False  # searches will be: what they need is made now, as no question waits


@dataclass(frozen=True)
class Told:
    """Up: in how many passages each hashed word is, and noisy means of groups of vectors. No text; who knows a word can tell
    whether it is there. Under `statistics = false` there are no words."""

    embedder: str
    sha256: str  # of the embedder whose vectors are searched
    passages: int
    words: int
    terms: Tensor  # (n,) int64, ascending
    having: Tensor  # (n,) int32
    centroids: Tensor  # (k, size) float32
    keeps: bool = False  # its passages stay: it answers by itself

    def problem(self, asked: Tell) -> str | None:
        if not (_are(str, self.embedder, self.sha256) and _are(int, self.passages, self.words) and _are(bool, self.keeps)):
            return "what it tells is of other types"
        if not asked.any_embedder and (self.sha256 != asked.wanted):
            return f"it searches by another embedder ({self.sha256[:12]}, asked {asked.wanted[:12]})"
        if not _flat(self.terms, torch.int64) or not _flat(self.having, torch.int32) or len(self.terms) != len(self.having):
            return "words and their counts do not go together"
        most = 2**40
        if not 0 <= self.passages <= most or not 0 <= self.words <= most:
            return "counts are out of bounds"
        if bool((self.having < 1).any()) or bool((self.having > self.passages).any()):
            return "counts are out of bounds"
        means = self.centroids
        if means.dim() != 2 or means.dtype != torch.float32 or not bool((means.abs() <= 1e6).all()):  # NaN is not, either
            return "centroids are not finite numbers"
        if len(self.centroids) > asked.centroids:
            return f"{len(self.centroids)} centroids, asked {asked.centroids}"
        return None

    @property
    def statistics(self) -> scoring.Statistics:
        having = dict(zip(self.terms.tolist(), self.having.tolist(), strict=True))
        return scoring.Statistics(self.passages, self.words, having)


@dataclass(frozen=True)
class Search:
    """Down: questions, without their texts."""

    asker: str
    sha256: str  # of the embedder
    vectors: Tensor  # (questions, size) int16
    words: Words
    mean_words: float
    words_share: float
    most: int  # by angle, and as many by words
    approximate: bool = False  # those by angle


@dataclass(frozen=True)
class Hits:
    """Up: of each question's candidates a number and two scores, in the order of the silo's documents. No name, no text."""

    at: Tensor  # (n,) int64
    cosine: Tensor  # (n,) float64
    words: Tensor  # (n,) float64
    ends: Tensor  # (questions,) int32

    def problem(self, asked: Search) -> str | None:
        if not _flat(self.at, torch.int64) or not _flat(self.ends, torch.int32):
            return "its scores are of another type"
        if not _flat(self.cosine, torch.float64) or not _flat(self.words, torch.float64):
            return "its scores are of another type"
        n, sizes = len(self.at), {len(self.cosine), len(self.words), len(self.at)}
        if len(sizes) > 1 or len(self.ends) != len(asked.vectors) or (len(self.ends) and int(self.ends[-1]) != n):
            return "its scores are not one for each candidate"
        steps = self.ends.diff(prepend=torch.zeros(1, dtype=self.ends.dtype))
        if bool((steps < 0).any()) or bool((steps > 2 * asked.most).any()):
            return f"more candidates than the {2 * asked.most} asked for"
        twice = (part for part in torch.tensor_split(self.at, self.ends[:-1].long()) if len(part.unique()) < len(part))
        if next(twice, None) is not None:
            return "a candidate twice"
        within = bool((self.cosine.abs() <= 1.001).all()) and bool((self.words >= 0).all()) and bool((self.words <= 1.001).all())
        return None if within else "scores are out of bounds"  # NaN is, too

    def found(self, silo: str, share: float) -> list[list[Found]]:
        """Each question's candidates, scored as one index would."""
        rows = list(zip(self.at.tolist(), self.cosine.tolist(), self.words.tolist(), strict=True))
        ends = [0, *self.ends.tolist()]
        return [
            [Found((1 - share) * c + share * w, at, place, c, w, silo) for place, (at, c, w) in enumerate(rows[begin:end])]
            for begin, end in pairwise(ends)
        ]


@dataclass(frozen=True)
class Fetch:
    """Down: passages that won, and the words of the question that each answers, by which a snippet is chosen."""

    asker: str
    at: Tensor  # (n,) int64
    words: Words
    questions: Tensor  # (n,) int32: which question's
    texts: bool = True  # False: names alone


@dataclass(frozen=True)
class Passages:
    """Up: what the silo's policy lets out of each; "" for what it keeps, and for a passage that is gone meanwhile."""

    documents: tuple[str, ...]
    sections: tuple[str, ...]
    texts: tuple[str, ...]

    def problem(self, asked: Fetch) -> str | None:
        every = (self.documents, self.sections, self.texts)
        if any(not isinstance(some, tuple) or len(some) != len(asked.at) or not _are(str, *some) for some in every):
            return "not one text for each passage"
        long = any(len(name) > NAME for some in every[:2] for name in some) or any(len(text) > TEXT for text in self.texts)
        return "a passage that is longer than any may be" if long else None


@dataclass(frozen=True)
class Say:
    """Down, to a silo that keeps its passages: the question itself, to be answered there."""

    asker: str
    question: str
    at: Tensor  # (n,) int64: its passages that won
    max_new_tokens: int


@dataclass(frozen=True)
class Saying:
    """Up: what the silo's own model wrote from its own passages. It may hold parts of them."""

    text: str

    def problem(self, asked: Say) -> str | None:
        fine = _are(str, self.text) and len(self.text) <= 100 * asked.max_new_tokens
        return None if fine else "an answer longer than asked for"


def corpus(silo: Silo) -> Corpus:
    found = getattr(silo.data, "corpus", None)
    if not isinstance(found, Corpus):
        raise SiloError('it has no documents: set index under [documents] of its silo.toml (`fedtailor index add` makes one)')
    return found


def embedder(asked: Tell) -> Embedder:
    """As all are told to search. Raises SiloError where its weights are others here."""
    base = embedding.resident(asked.embedder)
    if base.sha256 != asked.sha256:
        raise SiloError(f"its embedder {asked.embedder!r} has other weights ({base.sha256[:12]}, asked {asked.sha256[:12]})")
    if not asked.trainer:
        return base
    return trained(asked.embedder, asked.trainer, asked.tensors)


def trained(name: str, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Embedder:
    from fedtailor import trainers  # which knows of methods
    from fedtailor.retrieval.learner import learner

    return learner(name, trainers.named(trainer, "trainer")).embedder(dict(tensors))


@contextmanager
def its_own() -> Iterator[None]:
    """What is wrong with a silo's files is that silo's failure, and its owner's to mend: paths and settings stay in its log."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise SiloError(f"its index cannot be read ({error}): its owner should add the documents to a new one") from error
    except UserError as error:
        log.error("%s", error)
        raise SiloError("its documents cannot be asked: its own log says why") from error


@in_silo(memory=False)
def tell(silo: Silo, body: Tell) -> Told:
    """Makes the index where it has to be made, and embeds anew where the embedder was trained. How much is told for routing, and
    how much noise is on it, its own policy bounds; the same index tells the same each time: asking again takes no noise off."""
    with its_own():
        mine = corpus(silo)
        policy = mine.policy
        model = embedding.resident(mine.index().about("embedder")) if body.any_embedder and mine.path else embedder(body)
        searcher = mine.told(model)
        with searcher.index.snapshot():
            known = mine.visible()
            vectors = searcher.table().vectors if body.centroids else np.zeros((0, 0), np.int16)
        if body.approximate:
            searcher.graph()
        place = f"{searcher.index.version} {model.sha256}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7])
        # nothing that a server chooses is in the draw: of two that it could compare, the noise would fall out
        means = routing.centroids(vectors, policy.centroids, policy.noise, seed)[: body.centroids]
        terms = sorted(known.having) if policy.statistics else []
        having = torch.tensor([known.having[term] for term in terms], dtype=torch.int32)
        return Told(
            base_name(model.name), model.sha256, known.passages, known.words, torch.tensor(terms, dtype=torch.int64), having,
            torch.from_numpy(means), policy.share == "answers",
        )  # fmt: skip


@in_silo(memory=False)
def search(silo: Silo, body: Search) -> Hits:
    """What is found may then be fetched by who asked."""
    with its_own():
        mine = corpus(silo)
        searcher = mine.searcher(body.sha256)
        if not 1 <= body.most <= MOST:
            raise SiloError(f"{body.most} candidates: from 1 to {MOST} may be asked for")
        mine.book(body.asker, questions=len(body.vectors))
        if mine.policy.redacts:
            with searcher.index.snapshot():
                mine.visible()
        found = list[list[Found]]()
        for i, vector in enumerate(body.vectors.numpy()):
            asked = Question(vector, body.words.of(i), body.mean_words, body.words_share)
            some = searcher.search(asked, body.most, body.approximate)
            found.append(sorted(some, key=lambda one: one.place))
        every = [one for some in found for one in some]
        mine.show(body.asker, (one.at for one in every))
    return Hits(
        torch.tensor([one.at for one in every], dtype=torch.int64),
        torch.tensor([one.cosine for one in every], dtype=torch.float64),
        torch.tensor([one.words for one in every], dtype=torch.float64),
        torch.tensor(np.cumsum([len(some) for some in found]), dtype=torch.int32),
    )


@in_silo(memory=False)
def fetch(silo: Silo, body: Fetch) -> Passages:
    """Of passages that this asker found."""
    with its_own():
        mine = corpus(silo)
        policy, numbers = mine.policy, body.at.tolist()
        if len(numbers) > MOST:
            raise SiloError(f"{len(numbers)} passages in one request: {MOST} at most")
        told = list[tuple[str, str, str]]()
        for at, question in zip(numbers, body.questions.tolist(), strict=True):
            one = mine.passage(at, body.asker) if policy.share != "answers" else None
            if one is None:
                told.append(("", "", ""))
                continue
            number, document, passage = one
            text = let_out(policy, passage.text, body.words.of(question)) if body.texts else ""
            told.append((*cited(policy, document, number, passage.section), text))
        mine.book(body.asker, words=sum(counted(part) for parts in told for part in parts))
    return Passages(*(tuple(parts[i] for parts in told) for i in range(3)))


@in_silo(memory=False)
def say(silo: Silo, body: Say) -> Saying:
    """Where the policy is "answers" alone. What is to be redacted the model does not see."""
    with its_own():
        mine = corpus(silo)
        policy = mine.policy
        if policy.share != "answers":
            raise SiloError("it lets out passages, and does not answer by itself")
        if len(body.question) > QUESTION or len(body.at) > MOST or body.max_new_tokens < 1:
            raise SiloError(f"a question has {QUESTION} letters at most, {MOST} passages, and an answer of one token or more")
        most = min(body.max_new_tokens, policy.longest)
        mine.book(body.asker, questions=1, words=most)  # before anything is written; a token is a word at most
        found = [one for at in body.at.tolist() if (one := mine.passage(at, body.asker)) is not None]
        sources = [Source(silo.name, "", "", _seen(policy, passage.text), 0.0) for _, _, passage in found]
        text = writing.answer(silo.models["base"], body.question, sources, most) if sources else ""
        return Saying(_seen(policy, text))


def _seen(policy: Policy, text: str) -> str:
    return redacted(text, policy.recognizer) if policy.redacts else text


def _are(kind: type[Any], *values: Any) -> bool:
    return all(type(value) is kind for value in values)


def _flat(value: Any, kind: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype == kind


def words(many: Sequence[Mapping[int, float]]) -> Words:
    pairs = [pair for one in many for pair in sorted(one.items())]
    ends = np.cumsum([len(one) for one in many])
    return Words(
        torch.tensor([term for term, _ in pairs], dtype=torch.int64),
        torch.tensor([weight for _, weight in pairs], dtype=torch.float64),
        torch.tensor(ends, dtype=torch.int32),
    )

