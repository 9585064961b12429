"""What a silo with documents answers: how its words are spread, which passages score, and, of those that won, what it lets out.

Questions come as vectors and numbers of words; only a silo that answers by itself ("answers") is told the text. Scores leave
first, then passages of the winners alone, under the silo's policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.core import Silo, in_silo
from fedtailor.errors import SiloError
from fedtailor.retrieval import embedding, routing, scoring, writing
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.policy import cited, counted, let_out
from fedtailor.retrieval.scoring import Found, Question

MOST = 1000  # passages that one request may name


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
    trainer: Mapping[str, Any] = field(default_factory=dict)  # how the embedder was trained, as [method.trainer]; {}: it was not
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    centroids: int = 0  # 0: no routing
    noise: float = 0.0
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
        if len(self.terms) != len(self.having) or self.terms.dtype != torch.int64 or self.having.dtype != torch.int32:
            return "words and their counts do not go together"
        if self.passages < 0 or self.words < 0 or bool((self.having < 1).any()) or bool((self.having > self.passages).any()):
            return "counts are out of bounds"
        if self.centroids.dim() != 2 or not bool(self.centroids.isfinite().all()):
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
        n, sizes = len(self.at), {len(self.cosine), len(self.words), len(self.at)}
        if self.at.dtype != torch.int64 or self.cosine.dtype != torch.float64 or self.words.dtype != torch.float64:
            return "its scores are of another type"
        if len(sizes) > 1 or len(self.ends) != len(asked.vectors) or (len(self.ends) and int(self.ends[-1]) != n):
            return "its scores are not one for each candidate"
        steps = self.ends.diff(prepend=torch.zeros(1, dtype=self.ends.dtype))
        if bool((steps < 0).any()) or bool((steps > 2 * asked.most).any()):
            return f"more candidates than the {2 * asked.most} asked for"
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
        sizes = {len(self.documents), len(self.sections), len(self.texts), len(asked.at)}
        return None if len(sizes) == 1 else "not one text for each passage"


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
        return None if len(self.text) <= 100 * asked.max_new_tokens else "an answer longer than asked for"


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


@in_silo(memory=False)
def tell(silo: Silo, body: Tell) -> Told:
    """Makes the index where it has to be made, and embeds anew where the embedder was trained."""
    mine = corpus(silo)
    model = embedding.resident(mine.index().about("embedder")) if body.any_embedder and mine.path else embedder(body)
    searcher = mine.told(model)
    with searcher.index.snapshot():
        known = scoring.statistics(searcher.index, None if mine.policy.statistics else (), mine.tagged)
        vectors = searcher.table().vectors
        if body.approximate:
            searcher.graph()
    terms = sorted(known.having)
    centroids = routing.centroids(vectors, body.centroids, body.noise, silo.seed)
    having = torch.tensor([known.having[term] for term in terms], dtype=torch.int32)
    return Told(
        model.name, model.sha256, known.passages, known.words, torch.tensor(terms, dtype=torch.int64), having,
        torch.from_numpy(centroids), mine.policy.share == "answers",
    )  # fmt: skip


@in_silo(memory=False)
def search(silo: Silo, body: Search) -> Hits:
    mine = corpus(silo)
    searcher = mine.searcher(body.sha256)
    mine.book(body.asker, questions=len(body.vectors))
    found = list[list[Found]]()
    for i, vector in enumerate(body.vectors.numpy()):
        asked = Question(vector, body.words.of(i), body.mean_words, body.words_share)
        found.append(sorted(searcher.search(asked, min(body.most, MOST), body.approximate), key=lambda one: one.place))
    every = [one for some in found for one in some]
    return Hits(
        torch.tensor([one.at for one in every], dtype=torch.int64),
        torch.tensor([one.cosine for one in every], dtype=torch.float64),
        torch.tensor([one.words for one in every], dtype=torch.float64),
        torch.tensor(np.cumsum([len(some) for some in found]), dtype=torch.int32),
    )


@in_silo(memory=False)
def fetch(silo: Silo, body: Fetch) -> Passages:
    mine = corpus(silo)
    policy = mine.policy
    if policy.share == "answers":
        nothing = ("",) * len(body.at)
        return Passages(nothing, nothing, nothing)
    found = [mine.passage(at) for at in body.at.tolist()]
    texts = [""] * len(found)
    if body.texts:
        weights = [body.words.of(i) for i in body.questions.tolist()]
        texts = [let_out(policy, one[2].text, own) if one else "" for one, own in zip(found, weights, strict=True)]
        mine.book(body.asker, words=sum(map(counted, texts)))
    names = [cited(policy, one[1], one[0], one[2].section) if one else ("", "") for one in found]
    return Passages(tuple(name for name, _ in names), tuple(section for _, section in names), tuple(texts))


@in_silo(memory=False)
def say(silo: Silo, body: Say) -> Saying:
    mine = corpus(silo)
    found = [one for at in body.at.tolist() if (one := mine.passage(at)) is not None]
    sources = [Source(silo.name, document, passage.section, passage.text, 0.0) for _, document, passage in found]
    text = writing.answer(silo.models["base"], body.question, sources, body.max_new_tokens) if sources else ""
    mine.book(body.asker, words=counted(text))
    return Saying(text)


def words(many: Sequence[Mapping[int, float]]) -> Words:
    pairs = [pair for one in many for pair in sorted(one.items())]
    ends = np.cumsum([len(one) for one in many])
    return Words(
        torch.tensor([term for term, _ in pairs], dtype=torch.int64),
        torch.tensor([weight for _, weight in pairs], dtype=torch.float64),
        torch.tensor(ends, dtype=torch.int32),
    )

