"""An index of many passages: how fast it is made, changed and searched, in silos and pooled; and beside other stores.

    python benchmarks/retrieval.py                            5 silos of 20,000 passages, and the same 100,000 as one
    python benchmarks/retrieval.py --beside --passages 20000  one index, LanceDB, FAISS (those that are installed)

Words are drawn as often as a language's are (Zipf), vectors around 200 centres; no model is run, but for the rate of embedding
(`--embed`: so many passages by MiniLM). One thread. Times in ms; lower is better.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.scoring import Searcher, Statistics, question, statistics, united
from fedtailor.retrieval.store import SCALE, Store, make

SIZE, WORDS, OF_EACH = 384, 60, 20  # of a vector, of a passage, passages of a document
QUESTIONS, MOST = 100, 50


def corpus(count: int, dice: np.random.Generator) -> tuple[list[str], Any]:
    words = np.array([f"word{i}" for i in range(50_000)])
    drawn = np.minimum(dice.zipf(1.2, (count, WORDS)) - 1, len(words) - 1)
    centres = dice.normal(size=(200, SIZE))
    vectors = centres[dice.integers(0, len(centres), count)] + dice.normal(size=(count, SIZE))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [" ".join(row) for row in words[drawn]], vectors.astype(np.float32)


def whole(vectors: Any) -> Any:
    return np.rint(vectors * SCALE).astype(np.int16)


def filled(path: Path, texts: Sequence[str], vectors: Any, begin: int = 0) -> Store:
    index = make(path, "none", "", SIZE, (200, 40))
    for i in range(0, len(texts), OF_EACH):
        part = slice(i, i + OF_EACH)
        index.put(f"{(begin + i) // OF_EACH:06}.md", "", [Passage("", text) for text in texts[part]], vectors[part], "")
    return index


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def spread(times: Sequence[float]) -> str:
    return f"p50 {np.percentile(times, 50) * 1e3:.1f}, p95 {np.percentile(times, 95) * 1e3:.1f}"


def silos(count: int, many: int) -> None:
    dice = np.random.default_rng(0)
    texts, vectors = corpus(count, dice)
    vectors = whole(vectors)
    size = count // many // OF_EACH * OF_EACH
    with tempfile.TemporaryDirectory() as folder:
        parts = [slice(i * size, (i + 1) * size) for i in range(many)]
        took, apart = timed(
            lambda: [filled(Path(folder) / f"{i}", texts[p], vectors[p], p.start) for i, p in enumerate(parts)]
        )
        print(f"{many} silos of {size:,}: {size * many / took:,.0f} passages a second, embedding not counted")
        took, one = timed(lambda: filled(Path(folder) / "pooled", texts[: size * many], vectors[: size * many]))
        print(f"pooled, {size * many:,}: {size * many / took:,.0f} passages a second")
        new = [Passage("", text) for text in texts[:OF_EACH]]
        for name, index in (("a silo", apart[0]), ("pooled", one)):
            added, _ = timed(lambda i=index: i.put("new.md", "", new, vectors[:OF_EACH], ""))  # type: ignore[misc]
            gone, _ = timed(lambda i=index: i.remove("new.md"))  # type: ignore[misc]
            told, _ = timed(lambda i=index: statistics(i))  # type: ignore[misc]
            nothing = question("", vectors[0], Statistics(0, 0, {}))
            opened, _ = timed(lambda i=index, a=nothing: Searcher(i).search(a, 1))  # type: ignore[misc]
            changed = f"one document of {OF_EACH} passages in {added * 1e3:.1f}, out {gone * 1e3:.1f}"
            read = f"statistics {told * 1e3:.0f}, into memory {opened * 1e3:.0f}"
            print(f"{name}: {changed}; {read}; {index.status().bytes / 1e6:.0f} MB on disk")
        known = sum((statistics(index) for index in apart), Statistics(0, 0, {}))
        searchers, whole_one = [Searcher(index) for index in apart], Searcher(one)
        for searcher in (*searchers, whole_one):
            searcher.search(nothing, 1)
        slowest, pooled = list[float](), list[float]()
        for i in dice.integers(0, size * many, QUESTIONS).tolist():
            asked = question(" ".join(texts[i].split()[:8]), vectors[i], known)
            found = [timed(lambda s=s, a=asked: s.search(a, MOST)) for s in searchers]  # type: ignore[misc]
            merging, best = timed(lambda f=found: united([hits for _, hits in f], MOST))  # type: ignore[misc]
            slowest.append(max(took for took, _ in found) + merging)  # silos search at the same time
            took, hits = timed(lambda a=asked: united([whole_one.search(a, MOST)], MOST))  # type: ignore[misc]
            pooled.append(took)
            assert best == hits, "what silos found apart is not what one index finds"
        print(f"a question of 8 words, slowest silo and merging: {spread(slowest)}; pooled: {spread(pooled)}; the same found")


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
    """With its words and postings, which the others have not here."""
    build, index = timed(lambda: filled(folder / "index", texts, whole(vectors)))
    add, _ = timed(lambda: index.put("new.md", "", [Passage("", texts[0])], whole(vectors[:1]), ""))
    index.remove("new.md")
    searcher, nothing = Searcher(index), Statistics(0, 0, {})
    searcher.search(question("", whole(asked)[0], nothing, 0.0), 1)
    found = [timed(lambda v=v: searcher.search(question("", v, nothing, 0.0), 20)) for v in whole(asked)]  # type: ignore[misc]
    hits = [{hit.at - 1 for hit in some}  # numbers are given from 1 for _, some in found]
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
