"""How well each passage of an index answers a question: the angle between their vectors, and BM25 over their words.

Both are such that a passage's score does not depend on what else is in the index, given the statistics: candidates of silos that
were searched apart, united, are those of one index over all their passages, in the same order, ties included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fedtailor.retrieval import nearest
from fedtailor.retrieval.nearest import Graph
from fedtailor.retrieval.store import SCALE, Store, Vectors
from fedtailor.retrieval.terms import K1, B, idf, terms

BLOCK = 4096  # passages of which products are held at once
FUSED = 60  # of reciprocal rank fusion (Cormack et al. 2009)
SHAREABLE = "select id from documents where shareable"
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Of words, over as many passages as there are: of one silo, or of all of them."""

    passages: int
    words: int
    having: Mapping[int, int]  # a word's number -> how many passages have it

    def __add__(self, other: Statistics) -> Statistics:
        having = Counter(self.having)
        having.update(other.having)
        return Statistics(self.passages + other.passages, self.words + other.words, having)


def statistics(index: Store, of: Sequence[int] | None = None, shareable: bool = False) -> Statistics:
    """`of`: these words alone; None: all of the index. `shareable`: of documents with this tag alone."""
    tagged = f"where p.document in ({SHAREABLE})" if shareable else ""
    count = f"select count(*), coalesce(sum(p.words), 0) from passages p {tagged}"
    passages, words = index.db.execute(count).fetchone()
    source = f"postings join passages p on p.id = passage {tagged}" if shareable else "postings"
    if of is None:
        having = dict(index.db.execute(f"select term, count(*) from {source} group by term"))
    else:
        one = f"select count(*) from {source} {'and' if shareable else 'where'} term = ?"
        having = {term: index.db.execute(one, (term,)).fetchone()[0] for term in of}
    return Statistics(passages, words, having)


@dataclass(frozen=True)
class Question:
    """What a silo is asked: no text. Words that no silo has are left out."""

    vector: Vectors  # (size,)
    weights: Mapping[int, float]  # of each word its idf, over all silos
    mean_words: float  # of a passage, over all silos
    words_share: float = 0.3  # of BM25 in the score; the rest is the cosine's

    def __post_init__(self) -> None:
        if not 0 <= self.words_share <= 1:
            raise ValueError(f"words_share is from 0 to 1, not {self.words_share}")


def question(text: str, vector: Vectors, known: Statistics, words_share: float = 0.3) -> Question:
    having = {term: known.having.get(term, 0) for term in terms(text)}
    weights = {term: idf(known.passages, n) for term, n in sorted(having.items()) if n}
    return Question(vector, weights, known.words / max(known.passages, 1), words_share)


@dataclass(frozen=True)
class Found:
    """A candidate."""

    score: float
    at: int  # its number in its silo's index, by which it is fetched
    place: int  # among all that its silo found, in the order of documents' names and of passages in them
    cosine: float
    words: float  # BM25 as a share of the most that the question's words can give
    silo: str = ""

    @property
    def source(self) -> tuple[str, int]:
        """In the order that one index has, whose documents are named silo/document."""
        return f"{self.silo}/", self.place

    @property
    def order(self) -> tuple[float, str, int]:
        """Better ones have a lesser one."""
        return -self.score, *self.source


@dataclass(frozen=True)
class Table:
    """An index as it is searched: in memory, by document and place."""

    version: str
    ids: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]  # which sorts `ids`
    words: Numbers  # (passages,) of each
    vectors: Vectors  # (passages, size)
    shown: Callable[[int], Collection[int]] | None = None  # passage -> the words that it may be found by; None: by all
    postings: dict[int, tuple[npt.NDArray[np.int64], Numbers]] = field(default_factory=dict)  # of words that were asked for

    def having(self, index: Store, term: int) -> tuple[npt.NDArray[np.int64], Numbers]:
        """Places of the passages that have it, and how often each does. Read once: frequent words are asked for all the time."""
        if term not in self.postings:
            rows = index.db.execute("select passage, count from postings where term = ?", (term,)).fetchall()
            if self.shown is not None:
                rows = [row for row in rows if term in self.shown(row[0])]
            pairs = np.array(rows, np.int64).reshape(-1, 2)
            places = self.order[np.searchsorted(self.ids, pairs[:, 0], sorter=self.order).clip(max=len(self.ids) - 1)]
            held = self.ids[places] == pairs[:, 0]  # all of them, but where some documents alone are searched
            self.postings[term] = places[held], pairs[held, 1].astype(np.float64)
        return self.postings[term]


class Searcher:
    """An index, and of it in memory what searching needs, read anew where it changed.

    embedder: SHA-256 of the one whose vectors are searched; "": the index's own. shareable: documents with this tag alone.
    shown: as of `Table`.
    """

    def __init__(
        self, index: Store, silo: str = "", embedder: str = "", shareable: bool = False,
        shown: Callable[[int], Collection[int]] | None = None,
    ) -> None:  # fmt: skip
        self.index, self.silo, self.embedder, self.shareable, self.shown = index, silo, embedder, shareable, shown
        self.held: Table | None = None
        self.near: tuple[str, Graph] | None = None  # of which version

    def search(self, asked: Question, most: int, approximate: bool = False) -> list[Found]:
        """As `searched`. approximate: most of the best by angle, not surely all, as `graph` finds them; what is found is scored
        as ever."""
        with self.index.snapshot():
            return _searched(self.index, self.table(), asked, most, self.silo, self.graph() if approximate else None)

    def table(self) -> Table:
        """In a snapshot that the caller took."""
        if self.held is None or self.held.version != self.index.version:
            self.held = replace(_table(self.index, self.embedder, self.shareable), shown=self.shown)
        return self.held

    def graph(self) -> Graph | None:
        """Of the table's vectors, in a snapshot that the caller took. None where they are so few that comparing all is as good.
        Raises SiloError where FAISS is missing."""
        held = self.table()
        if len(held.ids) < nearest.LEAST:
            self.near = None
            return None
        if self.near is None or self.near[0] != held.version:
            same = self.near is not None and self.near[0].rpartition(" ")[0] == held.version.rpartition(" ")[0]  # the same file
            graph = self.near[1] if self.near and same else Graph(held.vectors.shape[1])
            self.near = None  # should it be broken off
            graph.follow(held.ids, held.vectors)
            self.near = held.version, graph
        return self.near[1]


def searched(index: Store, asked: Question, most: int, silo: str = "") -> list[Found]:
    """The best `most` by angle and the best `most` by words, each with both: the best `most` of all silos are among theirs. In a
    snapshot of the index that the caller took."""
    return _searched(index, _table(index), asked, most, silo)


def _table(index: Store, embedder: str = "", shareable: bool = False) -> Table:
    own = embedder in ("", index.about("embedder_sha256"))
    vector, more = ("p.vector", "") if own else ("o.vector", "join others o on o.passage = p.id and o.embedder = ?")
    tagged = "where d.shareable" if shareable else ""
    joined = f"passages p join documents d on d.id = p.document {more} {tagged}"
    ordered = f"select p.id, p.words, {vector} from {joined} order by d.name, p.number"
    rows = index.db.execute(ordered, () if own else (embedder,)).fetchall()
    vectors = np.frombuffer(b"".join(row[2] for row in rows), np.int16).reshape(len(rows), int(index.about("size")))
    ids = np.array([row[0] for row in rows], np.int64)
    return Table(index.version, ids, ids.argsort(), np.array([row[1] for row in rows], np.float64), vectors)


def _searched(index: Store, held: Table, asked: Question, most: int, silo: str, graph: Graph | None = None) -> list[Found]:
    if not len(held.ids):
        return []
    words = _words(index, held, asked)
    near, alike = _near(held.vectors, asked.vector, most, graph), [i for i in _best(words, most) if words[i]]
    chosen = np.array(sorted({*near, *alike}), np.int64)
    cosine, words = _cosines(held.vectors[chosen], asked.vector), words[chosen]
    score = (1 - asked.words_share) * cosine + asked.words_share * words
    rows = zip(score.tolist(), held.ids[chosen].tolist(), cosine.tolist(), words.tolist(), strict=True)
    found = [Found(s, at, place, c, w, silo) for place, (s, at, c, w) in enumerate(rows)]
    return sorted(found, key=lambda one: one.order)


def united(lists: Sequence[Sequence[Found]], most: int) -> list[Found]:
    """Of what each silo found, what one index over all would have: the best `most` by angle and by words, then by both."""
    every = sorted((one for some in lists for one in some), key=lambda one: one.source)
    near = sorted(every, key=lambda one: -one.cosine)[:most]
    alike = [one for one in sorted(every, key=lambda one: -one.words)[:most] if one.words]
    return sorted({*near, *alike}, key=lambda one: one.order)


def fused(lists: Sequence[Sequence[Found]], most: int) -> list[Found]:
    """Of silos whose scores cannot be compared, by ranks alone: `score` is the sum of 1 / (60 + rank) by angle and by words, each
    within its silo (reciprocal rank fusion, Cormack et al. 2009), over the most that it can be."""
    every = list[Found]()
    for some in lists:
        near = sorted(some, key=lambda one: (-one.cosine, one.place))
        alike = sorted((one for one in some if one.words), key=lambda one: (-one.words, one.place))
        score = Counter[int]()
        for ranked in (near, alike):
            score.update({one.place: 1 / (FUSED + rank) for rank, one in enumerate(ranked, 1)})
        every += [replace(one, score=score[one.place] * (FUSED + 1) / 2) for one in some]
    return sorted(every, key=lambda one: one.order)[:most]


def _near(vectors: Vectors, asked: Vectors, most: int, graph: Graph | None) -> list[int]:
    if graph is None:
        return _best(_cosines(vectors, asked), most)
    some = graph.nearest(asked, most)
    return [int(some[i]) for i in _best(_cosines(vectors[some], asked), most)]


def _cosines(vectors: Vectors, asked: Vectors) -> Numbers:
    """Products of 16 bits and their sums are whole numbers below 2^53: exact in any order, so the same in any index."""
    other = asked.astype(np.float64)
    blocks = [vectors[i : i + BLOCK].astype(np.float64) @ other for i in range(0, len(vectors), BLOCK)]
    whole: Numbers = np.concatenate([np.zeros(0), *blocks]) / SCALE**2
    return whole


def _words(index: Store, held: Table, asked: Question) -> Numbers:
    """BM25, one word after the other in the order of their numbers, as a share of the sum of idf (k1 + 1)."""
    score = np.zeros(len(held.ids))
    for term, weight in sorted(asked.weights.items()):
        places, counts = held.having(index, term)
        spread = K1 * (1 - B + B * held.words[places] / asked.mean_words)
        score[places] += weight * counts * (K1 + 1) / (counts + spread)
    most = sum(weight for _, weight in sorted(asked.weights.items())) * (K1 + 1)
    return score / most if most else score


def _best(score: Numbers, most: int) -> list[int]:
    """Places of the highest, of equal ones the first."""
    if len(score) > most:
        least = np.partition(score, -most)[-most]
        places = np.flatnonzero(score >= least)
    else:
        places = np.arange(len(score))
    ranked = places[np.argsort(-score[places], kind="stable")][:most]
    return [int(i) for i in ranked]
