"""A graph finds most of the nearest, and what it finds is scored as ever; documents in and out go into it, and come out of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.errors import SiloError
from fedtailor.retrieval import asking, nearest
from fedtailor.retrieval.asking import Search
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.nearest import GONE, LEAST, Graph
from fedtailor.retrieval.scoring import Question, Searcher, Statistics, question, statistics, united
from fedtailor.retrieval.store import SCALE, Vectors, make
from fedtailor.retrieval.terms import terms

SIZE, OF_EACH, MOST = 16, 500, 20


def drawn(count: int, groups: int = 0, seed: int = 0) -> Vectors:
    """(count, SIZE) of unit length, around as many centres."""
    dice = np.random.default_rng(seed)
    found = dice.normal(size=(count, SIZE))
    if groups:
        found = 0.4 * found + dice.normal(size=(groups, SIZE))[dice.integers(0, groups, count)]
    rounded: Vectors = np.rint(found / np.linalg.norm(found, axis=1, keepdims=True) * SCALE).astype(np.int16)
    return rounded


def graph(vectors: Vectors) -> Graph:
    made = Graph(SIZE)
    made.follow(np.arange(1, len(vectors) + 1), vectors)
    return made


def recall(made: Graph, vectors: Vectors, asked: Vectors) -> float:
    """Of the nearest 20."""
    exact = np.argsort(-(asked.astype(float) @ vectors.astype(float).T), axis=1)[:, :MOST]
    return float(np.mean([np.isin(best, made.nearest(one, MOST)).mean() for best, one in zip(exact, asked, strict=True)]))


@pytest.mark.parametrize("groups", [0, 40])
def test_most_of_the_nearest_are_found(groups: int) -> None:
    vectors = drawn(4100, groups)
    asked, vectors = vectors[:100], vectors[100:]
    made = graph(vectors)
    assert recall(made, vectors, asked) > 0.98
    places = made.nearest(asked[0], MOST)
    assert MOST < len(places) < len(vectors) / 10, "few of all are scored"
    assert (np.diff(places) > 0).all()
    assert len(made.nearest(asked[0], 300)) > 300


versions = st.lists(st.sets(st.integers(1, 60), min_size=1), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(versions)
def test_a_graph_follows_what_comes_and_goes(some: list[set[int]]) -> None:
    """So few passages that all of them are looked at: just those that are there now are found, each at its place."""
    vectors, made = drawn(61), Graph(SIZE)
    for ids in some:
        order = sorted(ids, key=lambda at: (at % 7, at))  # documents' order is not that of their numbers
        made.follow(np.array(order), vectors[order])
        assert made.nearest(vectors[0], 20).tolist() == list(range(len(order)))
        assert len(made.ids) * (1 - GONE) <= len(ids), "of what it walks through, most is there"


def test_a_document_more_or_less_is_no_new_graph() -> None:
    vectors = drawn(4100, 40)
    asked, vectors = vectors[:100], vectors[100:]
    made, ids = Graph(SIZE), np.arange(1, 4001)
    made.follow(ids[:3000], vectors[:3000])
    first = made.index
    kept = np.r_[500:4000]
    made.follow(ids[kept], vectors[kept])
    assert made.index is first, "500 of 3,000 are gone, 1,000 are new"
    assert recall(made, vectors[kept], asked) > 0.98
    assert recall(graph(vectors[kept]), vectors[kept], asked) > 0.98
    few = np.r_[1500:4000]
    made.follow(ids[few], vectors[few])
    assert made.index is not first, "1,500 of 4,000 are gone"
    assert made.index.ntotal == 2500
    assert recall(made, vectors[few], asked) > 0.98


def test_the_number_of_threads_changes_no_graph() -> None:
    vectors, before = drawn(3000, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = graph(vectors)
            found.append([made.nearest(one, 1).tolist() for one in drawn(50, seed=1)])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def filled(path: Path, silo: str, vectors: Vectors, texts: list[str]) -> Searcher:
    index = make(path, "none", "sha", SIZE, (20, 4))
    for i in range(0, len(texts), OF_EACH):
        some = [Passage("", text) for text in texts[i : i + OF_EACH]]
        index.put(f"{i // OF_EACH:03}.md", "", some, vectors[i : i + OF_EACH], "")
    return Searcher(index, silo)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Searcher]]:
    """Two, so large that graphs are made. In each 40 passages say and mean the same, over two documents."""
    folder, made = tmp_path_factory.mktemp("large"), list[Searcher]()
    for seed, silo in enumerate(("north", "south")):
        vectors = drawn(LEAST + 100, 60, seed)
        texts = [f"cat w{i % 97}" if i % 3 else f"dog w{i % 89} w{i % 83}" for i in range(len(vectors))]
        vectors[480:520] = drawn(1, seed=9)
        texts[480:520] = ["the same"] * 40
        made.append(filled(folder / silo, silo, vectors, texts))
    yield made
    for one in made:
        one.index.db.close()


def known(silos: list[Searcher]) -> Statistics:
    return sum((statistics(one.index) for one in silos), Statistics(0, 0, {}))


def test_what_is_found_has_the_scores_of_an_exact_search(silos: list[Searcher]) -> None:
    told, kept = known(silos), []
    for i, vector in enumerate(drawn(15, 60, seed=1)):
        asked = question(f"dog w{i} w{i + 3}", vector, told)
        for silo in silos:
            whole = silo.search(asked, LEAST + 100)
            every = {one.at: (one.score, one.cosine, one.words) for one in whole}
            found = silo.search(asked, MOST, approximate=True)
            assert [(one.score, one.cosine, one.words) for one in found] == [every[one.at] for one in found]
            assert found == sorted(found, key=lambda one: one.order)
            alike, near = (sorted(whole, key=lambda one, by=by: (-getattr(one, by), one.place)) for by in ("words", "cosine"))
            ats = {one.at for one in found}
            assert {one.at for one in alike[:MOST]} <= ats, "by words all are compared"
            kept.append(np.mean([one.at in ats for one in near[:MOST]]))
        assert all(silo.near for silo in silos)
    assert np.mean(kept) > 0.98


def test_of_equals_the_first_by_name_in_each_silo_and_over_silos(silos: list[Searcher]) -> None:
    """40 in each silo are as near: a graph looks at them all, so no other is chosen than exactly."""
    asked = question("", drawn(1, seed=9)[0], known(silos))
    apart = [(silo.search(asked, 30, approximate=True), silo.search(asked, 30)) for silo in silos]
    for found, exact in apart:
        assert [(one.at, one.place, one.cosine) for one in found] == [(one.at, one.place, one.cosine) for one in exact]
        assert [one.at for one in found] == list(range(481, 511)), "numbers are from 1"
    best = united([found for found, _ in apart], 35)
    assert best == united([exact for _, exact in apart], 35)
    assert [one.silo for one in best] == ["north"] * 30 + ["south"] * 5


def test_a_document_in_and_out_of_an_index(tmp_path: Path) -> None:
    """Found once it is there, and no more once it is gone; one index's graph goes on. Too few passages are compared."""
    vectors = drawn(LEAST, 60)
    silo = filled(tmp_path / "a", "a", vectors, ["cat"] * LEAST)
    far = -drawn(1, seed=5)
    asked = Question(far[0], {}, 1.0)
    before = silo.search(asked, 5, approximate=True)
    held = silo.near
    assert held is not None
    silo.index.put("0.md", "", [Passage("", "cat")], far, "")  # before all others by name: every place is another
    assert silo.search(asked, 1, approximate=True)[0].at == LEAST + 1
    assert silo.near is not None
    assert silo.near[1] is held[1]
    silo.index.remove("0.md")
    assert silo.search(asked, 5, approximate=True) == before == silo.search(asked, 5)
    silo.index.remove("003.md")
    assert silo.search(asked, 5, approximate=True) == silo.search(asked, 5)
    assert silo.near is None
    silo.index.db.close()


def test_a_silo_searches_as_it_is_asked(silos: list[Searcher], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FAISS it says what to install, where it would need it."""
    vectors = torch.from_numpy(drawn(3, 60, seed=2))
    words = asking.words([dict.fromkeys(terms("dog"), 1.0)] * 3)
    body = Search("me", "sha", vectors, words, 3.0, 0.3, MOST)
    corpus = Corpus("north", path=silos[0].index.path)
    silo = Silo("north", SiloData((), (), (), corpus=corpus), {}, 1)
    exact, found = asking.search(silo, body), asking.search(silo, replace(body, approximate=True))
    assert found.problem(body) is None
    assert np.isin(exact.at, found.at).mean() > 0.95
    assert corpus.held["sha"].near
    corpus.held.clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert torch.equal(asking.search(silo, body).at, exact.at)
    with pytest.raises(SiloError, match=r"pip install 'fedtailor\[ann\]'"):
        asking.search(silo, replace(body, approximate=True))
    corpus.index().db.close()


def test_few_passages_need_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    silo = filled(tmp_path / "a", "a", drawn(5), ["cat"] * 5)
    asked = Question(drawn(1)[0], {}, 1.0)
    assert silo.search(asked, 3, approximate=True) == silo.search(asked, 3)
    monkeypatch.setattr(nearest, "LEAST", 5)
    with pytest.raises(SiloError, match="among 5 passages or more"):
        silo.search(asked, 3, approximate=True)
    silo.index.db.close()
