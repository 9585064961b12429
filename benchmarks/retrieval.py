"""Passages in silos and pooled: how fast they are indexed, changed and found, over an engine; and beside other stores.

    python benchmarks/retrieval.py                            5 silos of 20,000 passages, and the same 100,000 as one
    python benchmarks/retrieval.py --beside --passages 20000  one index, LanceDB, FAISS (those that are installed)

Words are drawn as often as a language's are (Zipf), vectors around 200 centres; no model is run, but for the rate of embedding
(`--embed`: so many passages by MiniLM). A question has 8 words of a passage, its vector a cosine of about 0.7 with that one's.
Silos book on the disk what they are asked and tell, as ever. One thread. Times in ms; lower is better.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from fedtailor.baselines import POOLED
from fedtailor.core import Reply
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.retrieval.asking import Told
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.finding import Finder, Result, Ways
from fedtailor.retrieval.judging import document
from fedtailor.retrieval.nearest import LEAST
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.scoring import Searcher, Statistics, question, statistics
from fedtailor.retrieval.session import Turn
from fedtailor.retrieval.store import SCALE, load, make

SIZE, WORDS, OF_EACH = 384, 60, 20  # of a vector, of a passage, passages of a document
QUESTIONS, OURS = 100, "none"  # OURS: in place of an embedder's SHA-256


def corpus(count: int, dice: np.random.Generator) -> tuple[list[str], Any]:
    words = np.array([f"word{i}" for i in range(50_000)])
    drawn = np.minimum(dice.zipf(1.2, (count, WORDS)) - 1, len(words) - 1)
    centres = dice.normal(size=(200, SIZE))
    vectors = centres[dice.integers(0, len(centres), count)] + dice.normal(size=(count, SIZE))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [" ".join(row) for row in words[drawn]], vectors.astype(np.float32)


def whole(vectors: Any) -> Any:
    return np.rint(vectors * SCALE).astype(np.int16)


def filled(path: Path, texts: Sequence[str], vectors: Any, names: Sequence[str]) -> None:
    """names: of each passage's document."""
    with make(path, OURS, OURS, SIZE, (200, 40)) as index:
        for i in range(0, len(texts), OF_EACH):
            part = slice(i, i + OF_EACH)
            index.put(names[i], "", [Passage("", text) for text in texts[part]], vectors[part], "")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def spread(times: Sequence[float]) -> str:
    return f"p50 {np.percentile(times, 50) * 1e3:.1f}, p95 {np.percentile(times, 95) * 1e3:.1f}"


@dataclass(frozen=True)
class Drawn:
    """In place of an embedder: vectors of questions that were drawn before."""

    vectors: Mapping[str, Any]

    def questions(self, texts: Sequence[str]) -> Any:
        return np.stack([self.vectors[text] for text in texts])


@dataclass
class Noted:
    """An `Ask` that notes how long each reply took: one silo after the other is asked here, elsewhere all at once."""

    turn: Turn
    seconds: list[float] = field(default_factory=list)

    def __call__(self, work: Any, body: Any, **how: Any) -> Iterator[Reply[Any]]:
        began = time.perf_counter()
        for reply in self.turn(work, body, **how):
            self.seconds.append(time.perf_counter() - began)
            yield reply
            began = time.perf_counter()


@dataclass
class Federation:
    """Index files as silos, over an engine."""

    paths: Mapping[str, Path]
    drawn: Drawn
    search: Any = "exact"

    def __post_init__(self) -> None:
        self.corpora = {silo: Corpus(silo, Policy(), path) for silo, path in self.paths.items()}
        data = {silo: SiloData((), (), (), corpus=one) for silo, one in self.corpora.items()}
        self.ask = Noted(Turn(InProcess(data, {}), tuple(data)))
        self.finder = Finder(Ways(search=self.search), self.ask, {silo: self._told(silo) for silo in data}, {OURS: self.drawn})
        self.found, self.sources = list[Result](), list[list[tuple[str, str, float]]]()
        self.finding, self.apart, self.whole = list[float](), list[float](), list[float]()

    def _told(self, silo: str) -> Told:
        known = statistics(self.corpora[silo].index())
        terms = sorted(known.having)
        having = torch.tensor([known.having[term] for term in terms], dtype=torch.int32)
        return Told(OURS, OURS, known.passages, known.words, torch.tensor(terms), having, torch.zeros(0, SIZE))

    def ready(self) -> float:
        """Seconds for the graphs of all silos; they read what they hold into memory first."""
        took = 0.0
        for one in self.corpora.values():
            searcher = one.searcher(OURS)
            with searcher.index.snapshot():
                searcher.table()
                took += timed(searcher.graph)[0] if self.search == "approximate" else 0.0
        return took

    @property
    def graphs(self) -> bool:
        return any(one.searcher(OURS).near for one in self.corpora.values())

    def question(self, text: str) -> None:
        self.ask.turn.round += 1
        self.ask.seconds.clear()
        took, (result,) = timed(lambda: self.finder.find([text]))
        silos = list(self.ask.seconds)
        fetching, (sources,) = timed(lambda: self.finder.sources([result], self.finder.how.passages))
        self.ask.turn.engine.commit()
        assert len(silos) == len(self.paths), "a silo did not answer"
        self.found.append(result)
        self.sources.append([(document(one), one.text, one.score) for one in sources])
        self.finding.append(took)
        self.apart.append(took - sum(silos) + max(silos))
        self.whole.append(took + fetching)

    @property
    def scores(self) -> list[list[tuple[float, float, float]]]:
        return [[(one.score, one.cosine, one.words) for one in result.found] for result in self.found]


def silos(count: int, many: int) -> None:
    dice = np.random.default_rng(0)
    size = count // many // OF_EACH * OF_EACH
    texts, exact = corpus(size * many, dice)
    vectors, names = whole(exact), [f"silo-{i // size}/{i // OF_EACH:06}.md" for i in range(size * many)]
    at = dice.integers(0, len(texts), QUESTIONS + 1).tolist()
    near = exact[at] + dice.normal(size=(len(at), SIZE)) / SIZE**0.5
    asked = [" ".join(texts[i].split()[:8]) + f" q{n}" for n, i in enumerate(at)]  # the last word is nobody's: all differ
    drawn = Drawn(dict(zip(asked, whole(near / np.linalg.norm(near, axis=1, keepdims=True)), strict=True)))
    print(f"{many} silos of {size:,} passages, {len(texts):,} pooled; {QUESTIONS} questions; times in ms")
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"silo-{i}": Path(folder) / f"{i}" for i in range(many)}
        pooled = {POOLED: Path(folder) / "pooled"}
        took = 0.0
        for i, (silo, path) in enumerate(paths.items()):
            part = slice(i * size, (i + 1) * size)
            own = [name.removeprefix(f"{silo}/") for name in names[part]]
            took += timed(lambda p=path, s=part, o=own: filled(p, texts[s], vectors[s], o))[0]  # type: ignore[misc]
        once, _ = timed(lambda: filled(pooled[POOLED], texts, vectors, names))
        rates = f"silos {len(texts) / took:,.0f}, pooled {len(texts) / once:,.0f}"
        print(f"indexing, passages a second, embedding apart: {rates}")
        new = [Passage("", text) for text in texts[:OF_EACH]], vectors[:OF_EACH]
        found = dict[tuple[str, str], Federation]()
        for search in ("exact", "approximate"):
            for name, some in (("silos", paths), ("pooled", pooled)):
                one = found[search, name] = Federation(some, drawn, search)
                making = one.ready()
                if one.graphs:
                    print(f"{name}: graphs in {making:.1f} s, {len(texts) / making:,.0f} passages a second")
                for text in (asked[-1], *asked[:-1]):
                    one.question(text)
                for first in (one.found, one.sources, one.finding, one.apart, one.whole):
                    first.pop(0)  # type: ignore[attr-defined]
                print(f"{search}, {name}: finding {spread(one.finding)}; with sources {spread(one.whole)}")
                if len(some) > 1:
                    print(f"{search}, {name} at the same time: slowest and merging {spread(one.apart)}")
                changes(f"{search}, {'a silo' if len(some) > 1 else name}", next(iter(one.corpora.values())), new, asked[0], one)
        apart, one = found["exact", "silos"], found["exact", "pooled"]
        assert apart.scores == one.scores, "silos found apart what one index does not find"
        assert apart.sources == one.sources, "the passages are others"
        print(f"exact: of all {QUESTIONS} questions the silos' passages, scores and order are those of one index")
        for name in ("silos", "pooled"):
            kept(name, found["exact", name], found["approximate", name], [names[i] for i in at])


def changes(name: str, corpus: Corpus, new: tuple[list[Passage], Any], text: str, one: Federation) -> None:
    """One document in, a question after it, and out again."""
    index, searcher = corpus.index(), corpus.searcher(OURS)
    asked = question(text, one.drawn.vectors[text], one.finder.known)
    search = lambda: searcher.search(asked, 20, one.search == "approximate")  # noqa: E731
    told, _ = timed(lambda: statistics(index))
    added, _ = timed(lambda: index.put("new.md", "", *new, ""))
    after, _ = timed(search)
    again, _ = timed(search)
    gone, _ = timed(lambda: index.remove("new.md"))
    changed = f"a document of {OF_EACH} passages in {added * 1e3:.1f}, out {gone * 1e3:.1f}"
    first = f"the first search after it {after * 1e3:.0f}, the next {again * 1e3:.1f}"
    size = index.status()
    print(f"{name}: {changed}; {first}; statistics {told * 1e3:.0f}; {size.bytes / 1e6:.0f} MB of {size.passages:,} passages")


def kept(name: str, exact: Federation, some: Federation, right: Sequence[str]) -> None:
    """How much of what an exact search finds an approximate one does."""
    if not some.graphs:
        print(f"{name}: fewer than {LEAST:,} each, so no graph is made, and all are compared")
        return
    pairs = list(zip(exact.sources, some.sources, strict=True))
    within = np.mean([np.mean([source in other for source in best]) for best, other in pairs])
    first = np.mean([1 / (other.index(best[0]) + 1) if best[0] in other else 0 for best, other in pairs])
    ats = [[{(hit.silo, hit.at) for hit in result.found} for result in one.found] for one in (exact, some)]
    near = np.mean([len(best & other) / len(best) for best, other in zip(*ats, strict=True)])
    shares = f"of the exact first 5 approximate has {within:.4f}, of all candidates {near:.4f}"
    print(f"{name}: {shares}; MRR of the exact first {first:.4f}")
    for how, one in (("exact", exact), ("approximate", some)):
        ranks = [[source[0] for source in best] for best in one.sources]
        where = [names.index(own) + 1 if own in names else 0 for names, own in zip(ranks, right, strict=False)]
        recall, mrr = np.mean([rank > 0 for rank in where]), np.mean([1 / rank if rank else 0 for rank in where])
        print(f"{name}, {how}: of the documents that questions are from, recall@5 {recall:.4f}, MRR@5 {mrr:.4f}")


def beside(count: int) -> None:
    dice = np.random.default_rng(0)
    texts, vectors = corpus(count, dice)
    asked = vectors[:QUESTIONS]
    exact = [set(np.argsort(-(vectors @ v), kind="stable")[:20].tolist()) for v in asked]
    for name, way in (("fedtailor", _ours), ("LanceDB", _lancedb), ("FAISS HNSW", _faiss)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                build, add, took, found = way(Path(folder), texts, vectors, asked)
            except ModuleNotFoundError as error:
                print(f"{name}: not measured, pip install {error.name}")
                continue
        recall = np.mean([len(one & other) / 20 for one, other in zip(exact, found, strict=True)])
        print(f"{name}: made in {build:.2f} s, one passage in {add * 1e3:.1f}, nearest 20 in {spread(took)}, recall {recall:.3f}")


Measured = tuple[float, float, list[float], list[set[int]]]


def _ours(folder: Path, texts: Sequence[str], vectors: Any, asked: Any) -> Measured:
    """Exactly; with its words and postings, which the others have not here."""
    names = [f"{i // OF_EACH:06}.md" for i in range(len(texts))]
    build, _ = timed(lambda: filled(folder / "index", texts, whole(vectors), names))
    index = load(folder / "index")
    add, _ = timed(lambda: index.put("new.md", "", [Passage("", texts[0])], whole(vectors[:1]), ""))
    index.remove("new.md")
    searcher, nothing = Searcher(index), Statistics(0, 0, {})
    searcher.search(question("", whole(asked)[0], nothing, 0.0), 1)
    found = [timed(lambda v=v: searcher.search(question("", v, nothing, 0.0), 20)) for v in whole(asked)]  # type: ignore[misc]
    hits = [{hit.at - 1 for hit in some} for _, some in found]  # numbers are given from 1
    return build, add, [took for took, _ in found], hits


def _lancedb(folder: Path, texts: Sequence[str], vectors: Any, asked: Any) -> Measured:
    import lancedb
    import pyarrow as pa

    def rows(ids: range) -> Any:
        some = pa.FixedSizeListArray.from_arrays(pa.array(vectors[[i % len(vectors) for i in ids]].ravel()), SIZE)
        return pa.table({"id": list(ids), "text": [texts[i % len(texts)] for i in ids], "vector": some})

    build, index = timed(lambda: lancedb.connect(str(folder)).create_table("t", rows(range(len(texts)))))
    add, _ = timed(lambda: index.add(rows(range(len(texts), len(texts) + 1))))
    index.delete(f"id = {len(texts)}")
    found = [timed(lambda v=v: index.search(v).limit(20).to_list()) for v in asked]  # type: ignore[misc]
    return build, add, [took for took, _ in found], [{row["id"] for row in some} for _, some in found]


def _faiss(folder: Path, texts: Sequence[str], vectors: Any, asked: Any) -> Measured:
    """In memory, written as a whole after a change; no texts."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(SIZE, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = 64
    build, _ = timed(lambda: (index.add(vectors), faiss.write_index(index, str(folder / "index"))))
    found = [timed(lambda v=v: index.search(v[None], 20)[1][0]) for v in asked]  # type: ignore[misc]
    add, _ = timed(lambda: (index.add(vectors[:1]), faiss.write_index(index, str(folder / "index"))))
    return build, add, [took for took, _ in found], [set(some.tolist()) for _, some in found]


def embedded(count: int) -> None:
    from fedtailor.retrieval import embedding

    texts, _ = corpus(count, np.random.default_rng(0))
    model = embedding.load("minilm")
    took, _ = timed(lambda: model.passages([" ".join(text.split()[:30]) for text in texts]))
    print(f"embedding by MiniLM, passages of 30 made-up words: {count / took:.0f} a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--silos", type=int, default=5)
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--embed", type=int, default=0)
    given = parser.parse_args()
    if given.embed:
        embedded(given.embed)
    elif given.beside:
        beside(given.passages)
    else:
        silos(given.passages, given.silos)
