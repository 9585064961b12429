"""Scores by hand; silos that are searched apart give what one index over all would, ties included."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.scoring import (
    Found,
    Question,
    Searcher,
    Statistics,
    fused,
    question,
    searched,
    statistics,
    united,
)
from fedtailor.retrieval.store import SCALE, Store, Vectors, make
from fedtailor.retrieval.terms import K1, terms

WORDS = ("cat", "dog", "sat", "the")


def index(folder: Path, name: str, documents: dict[str, list[tuple[str, list[int]]]]) -> Store:
    """Each document's passages with their vectors."""
    made = make(folder / name, "tiny", "", 3, (20, 4))
    for document, passages in documents.items():
        vectors = np.array([vector for _, vector in passages], np.int16)
        made.put(document, "s", [Passage("", text) for text, _ in passages], vectors, "now")
    return made


def named(index: Store, hit: Found) -> tuple[str, int]:
    """The document that a hit is in, and which passage of it."""
    joined = "passages p join documents d on d.id = p.document"
    name, number = index.db.execute(f"select d.name, p.number from {joined} where p.id = ?", (hit.at,)).fetchone()
    return name, number


def vector(*numbers: int) -> Vectors:
    return np.array(numbers, np.int16)


def asked(text: str, at: Vectors, known: Statistics, share: float = 0.5) -> Question:
    return question(text, at, known, share)


def test_scores_by_hand(tmp_path: Path) -> None:
    """Three passages of 3, 3 and 6 words, mean 4; "cat" is in two, "sat" in one, "bird" in none."""
    one = index(tmp_path, "a", {
        "a.md": [("the cat sat", [SCALE, 0, 0]), ("the dog ran", [0, SCALE, 0])],
        "b.md": [("the cat and the other cat", [-SCALE, 0, 0])],
    })  # fmt: skip
    known = statistics(one)
    cat, sat, the = (next(iter(terms(word))) for word in ("cat", "sat", "the"))
    assert (known.passages, known.words) == (3, 12)
    assert (known.having[cat], known.having[sat], known.having[the]) == (2, 1, 3)
    assert statistics(one, [cat]).having == {cat: 2}
    it = asked("cat sat bird", vector(SCALE, 0, 0), known)
    assert it.weights == pytest.approx({cat: math.log(1 + 1.5 / 2.5), sat: math.log(1 + 2.5 / 1.5)})
    found = {named(one, hit): hit for hit in searched(one, it, 5)}
    assert [found[key].cosine for key in (("a.md", 0), ("a.md", 1), ("b.md", 0))] == [1, 0, -1]
    most = sum(it.weights.values()) * 2.2
    short, long = 1.2 * (0.25 + 0.75 * 3 / 4), 1.2 * (0.25 + 0.75 * 6 / 4)  # k1 (1 - b + b words / mean)
    first = sum(it.weights.values()) * 2.2 / (1 + short)
    assert found["a.md", 0].words == pytest.approx(first / most)
    assert found["b.md", 0].words == pytest.approx(it.weights[cat] * 2 * (K1 + 1) / (2 + long) / most)
    assert found["a.md", 1].words == 0
    assert found["a.md", 0].score == pytest.approx(0.5 + 0.5 * first / most)


def test_an_empty_index_and_an_empty_question(tmp_path: Path) -> None:
    empty = index(tmp_path, "a", {})
    nothing = asked("cat", vector(1, 0, 0), statistics(empty))
    assert nothing.weights == {}
    assert searched(empty, nothing, 5) == []
    some = index(tmp_path, "b", {"a.md": [("cat", [1, 0, 0])]})
    assert [one.words for one in searched(some, asked("?", vector(1, 0, 0), statistics(some)), 5)] == [0]


def test_statistics_add_up() -> None:
    assert Statistics(2, 9, {1: 2, 2: 1}) + Statistics(3, 4, {2: 2, 3: 1}) == Statistics(5, 13, {1: 2, 2: 3, 3: 1})


three = st.lists(st.sampled_from([-SCALE, 0, 7, SCALE]), min_size=3, max_size=3)  # few, so that there are ties
some_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
where = st.tuples(st.sampled_from(["A", "A-", "B"]), st.sampled_from(["a.md", "b/c.md", "b-c.md"]))
corpus = st.dictionaries(where, st.lists(st.tuples(some_words, three), min_size=1, max_size=3), max_size=7)


@settings(max_examples=60)
@given(corpus, st.just("") | some_words, three, st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_silos_apart_find_what_one_index_finds(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[tuple[str, str], list[tuple[str, list[int]]]], text: str, at: list[int],
    most: int, share: float,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("silos")
    apart = defaultdict[str, dict[str, list[tuple[str, list[int]]]]](dict)
    for (silo, name), passages in whole.items():
        apart[silo][name] = passages
    pooled = index(folder, "pooled", {f"{silo}/{name}": passages for (silo, name), passages in whole.items()})
    silos = {silo: index(folder, silo, documents) for silo, documents in apart.items()}
    known = sum((statistics(one) for one in silos.values()), Statistics(0, 0, {}))
    assert known == statistics(pooled)
    it = asked(text, np.array(at, np.int16), known, share)
    found = united([searched(one, it, most, silo) for silo, one in silos.items()], most)
    names = [(f"{one.silo}/{name}", number) for one in found for name, number in [named(silos[one.silo], one)]]
    one_by_one = united([searched(pooled, it, most)], most)
    assert names == [named(pooled, one) for one in one_by_one]
    assert [(one.score, one.cosine, one.words) for one in found] == [(one.score, one.cosine, one.words) for one in one_by_one]
    for one in (pooled, *silos.values()):
        one.db.close()


def test_of_equal_scores_the_first_by_name_and_place(tmp_path: Path) -> None:
    one = index(tmp_path, "a", {name: [("cat", [SCALE, 0, 0])] * 2 for name in ("b.md", "a.md", "c.md")})
    found = searched(one, asked("cat", vector(SCALE, 0, 0), statistics(one)), 3)
    assert [named(one, hit) for hit in found] == [("a.md", 0), ("a.md", 1), ("b.md", 0)]
    assert found[0].order < found[1].order < found[2].order


def test_more_than_a_block_of_passages(tmp_path: Path) -> None:
    """9,000 passages, compared with all products at once."""
    dice = np.random.default_rng(3)
    many = dice.integers(-SCALE, SCALE, (9000, 3))
    one = index(tmp_path, "a", {"a.md": [("cat", row) for row in many.tolist()]})
    at = dice.integers(-SCALE, SCALE, 3)
    found = searched(one, asked("", at.astype(np.int16), statistics(one), 0.0), 10)
    scores = many @ at
    assert [named(one, hit)[1] for hit in found] == np.argsort(-scores, kind="stable")[:10].tolist()
    assert [hit.cosine * SCALE**2 for hit in found] == sorted(scores.tolist(), reverse=True)[:10]


def test_what_is_held_in_memory_follows_the_index(tmp_path: Path) -> None:
    """A document goes, another comes in its place: neither its words nor its vector stay."""
    one = index(tmp_path, "a", {"a.md": [("cat", [SCALE, 0, 0])], "b.md": [("bird sings", [0, SCALE, 0])]})
    searcher, it = Searcher(one), asked("bird", vector(0, SCALE, 0), statistics(one))
    assert named(one, searcher.search(it, 1)[0]) == ("b.md", 0)
    held = searcher.held
    assert searcher.search(it, 1)
    assert searcher.held is held, "nothing changed"
    one.remove("b.md")
    one.put("c.md", "s", [Passage("", "cat cat cat")], np.array([[0, 0, SCALE]], np.int16), "now")
    found = searcher.search(asked("cat", vector(0, 0, SCALE), statistics(one)), 5)
    assert [(named(one, hit)[0], hit.cosine) for hit in found] == [("c.md", 1), ("a.md", 0)]
    assert all(hit.words > 0 for hit in found)


def test_a_silo_is_part_of_a_source() -> None:
    """Two silos may have a document of the same name, that says the same."""
    one, other = (Found(0.5, 1, 0, 0.5, 0.5, silo) for silo in ("north", "south"))
    assert united([[one], [other]], 5) == [one, other]


def test_shares_are_shares() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Question(vector(0, 0, 0), {}, 1.0, 1.5)
    assert Found(0.5, 7, 3, 1, 0).order == (-0.5, "/", 3)
    assert Found(0.5, 7, 3, 1, 0, "north").order == (-0.5, "north/", 3)


def test_ranks_are_fused_by_hand() -> None:
    """north: first by angle and by words; second by angle, no words. south: first by angle, and by words second and first."""
    north = [Found(9, 1, 0, 0.9, 0.9, "north"), Found(8, 2, 1, 0.1, 0, "north")]
    south = [Found(7, 3, 0, 0.5, 0.1, "south"), Found(6, 4, 1, 0.4, 0.2, "south")]
    found = fused([north, south], 4)
    assert [(one.silo, one.at) for one in found] == [("north", 1), ("south", 3), ("south", 4), ("north", 2)]
    first, second = 61 / 61, 61 / 62
    assert [one.score for one in found] == pytest.approx([first, (first + second) / 2, (first + second) / 2, second / 2])
    assert fused([north, south], 1) == found[:1]


def test_documents_with_a_tag_alone_are_searched_and_counted(tmp_path: Path) -> None:
    one = index(tmp_path, "a", {"a.md": [("cat", [SCALE, 0, 0])], "b.md": [("cat bird", [0, SCALE, 0])]})
    one.share(["b.md"], True)
    assert one.shareable() == {"b.md"}
    (cat,) = terms("cat")
    for of in (None, [cat]):
        known = statistics(one, of, shareable=True)
        assert (known.passages, known.words, known.having[cat]) == (1, 2, 1)
    found = Searcher(one, shareable=True).search(asked("cat", vector(SCALE, 0, 0), known), 5)
    assert [named(one, hit)[0] for hit in found] == ["b.md"]
    assert found[0].words > 0


def test_vectors_of_another_embedder(tmp_path: Path) -> None:
    """Beside the index's own; what is added later lacks one until it is embedded; what is gone has none."""
    one = index(tmp_path, "a", {"a.md": [("cat", [SCALE, 0, 0])], "b.md": [("dog", [0, SCALE, 0])]})
    ids = [at for at, _ in one.lacking("trained")]
    assert len(ids) == 2
    one.embed("trained", ids, np.array([[0, 0, SCALE], [SCALE, 0, 0]], np.int16))
    assert one.lacking("trained") == []
    at = asked("", vector(SCALE, 0, 0), statistics(one), 0.0)
    assert named(one, Searcher(one).search(at, 1)[0]) == ("a.md", 0)
    assert named(one, Searcher(one, embedder="trained").search(at, 1)[0]) == ("b.md", 0)
    one.remove("a.md")
    one.put("c.md", "s", [Passage("", "bird")], np.array([[0, 0, SCALE]], np.int16), "now")
    assert [passage.text for _, passage in one.lacking("trained")] == ["bird"]
    assert [named(one, hit)[0] for hit in Searcher(one, embedder="trained").search(at, 5)] == ["b.md"]
    one.keep("trained", others=1)
    one.keep("second", others=1)
    assert len(one.lacking("trained")) == 1, "the last one is kept, too"
    one.keep("third", others=1)
    assert len(one.lacking("trained")) == 2
