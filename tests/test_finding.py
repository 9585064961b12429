"""Silos are asked, and what they found becomes one list: that of one index over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.baselines import pooled
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, SiloError
from fedtailor.methods.rag import Rag
from fedtailor.retrieval import asking, scoring
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.finding import Finder, Ways
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.store import Store, Vectors, make
from libraries import LIBRARIES, corpora, indexes

SHA = "e" * 64
Documents = dict[str, list[tuple[str, list[int]]]]


@dataclass(frozen=True)
class Fixed:
    """An embedder whose questions' vectors are given: the silos' are in their indexes."""

    vectors: Sequence[Sequence[int]]
    name: str = "fixed"
    sha256: str = SHA

    def questions(self, texts: Sequence[str]) -> Vectors:
        return np.array(self.vectors, np.int16)


def index(path: Path, documents: Documents) -> Store:
    made = make(path, "fixed", SHA, 3, (20, 4))
    for name, passages in documents.items():
        vectors = np.array([vector for _, vector in passages], np.int16)
        made.put(name, "s", [Passage("", text) for text, _ in passages], vectors, "now")
    return made


def told(engine: InProcess) -> dict[str, asking.Told]:
    found = {}
    for silo, desk in engine.desks.items():
        searcher = desk.data.corpus.searcher(SHA)
        known = scoring.statistics(searcher.index)
        terms = sorted(known.having)
        counts = torch.tensor([known.having[term] for term in terms], dtype=torch.int32)
        found[silo] = asking.Told("fixed", SHA, known.passages, known.words, torch.tensor(terms), counts, torch.zeros(0, 3))
    return found


def finder(data: dict[str, SiloData], vectors: Sequence[Sequence[int]], how: Ways) -> Finder:
    engine = InProcess(data, {})
    return Finder(how, engine.reach(1), told(engine), {SHA: Fixed(vectors)})  # type: ignore[dict-item]


three = st.lists(st.sampled_from([-18_000, 0, 7, 18_000]), min_size=3, max_size=3)  # few, so that there are ties; at most 1 long
some_words = st.lists(st.sampled_from(("cat", "dog", "sat", "the")), min_size=1, max_size=4).map(" ".join)
where = st.tuples(st.sampled_from(["A", "A-", "B"]), st.sampled_from(["a.md", "b/c.md", "b-c.md"]))
whole = st.dictionaries(where, st.lists(st.tuples(some_words, three), min_size=1, max_size=3), min_size=1, max_size=7)
asked = st.lists(st.tuples(some_words | st.just("?"), three), min_size=1, max_size=3)


@settings(max_examples=40)
@given(whole, asked, st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_over_the_wire_silos_find_what_one_index_finds(
    tmp_path_factory: pytest.TempPathFactory, documents: dict[tuple[str, str], list[tuple[str, list[int]]]],
    questions: list[tuple[str, list[int]]], most: int, share: float,
) -> None:  # fmt: skip
    """Documents, places, scores, ties, and the passages that are fetched."""
    folder = tmp_path_factory.mktemp("silos")
    apart: dict[str, Documents] = {}
    for (silo, name), passages in documents.items():
        apart.setdefault(silo, {})[name] = passages
    for silo, some in apart.items():
        index(folder / silo, some).db.close()
    index(folder / "all", {f"{silo}/{name}": some for (silo, name), some in documents.items()}).db.close()
    how, vectors = Ways(candidates=most, words_share=share), [vector for _, vector in questions]
    federated = finder(
        {silo: SiloData((), (), (), corpus=Corpus(silo, Policy(), folder / silo)) for silo in apart}, vectors, how
    )
    one = finder({"all": SiloData((), (), (), corpus=Corpus("all", Policy(), folder / "all"))}, vectors, how)
    texts = [text for text, _ in questions]
    found, expected = federated.find(texts), one.find(texts)
    for here, there in zip(found, expected, strict=True):
        assert [(hit.score, hit.cosine, hit.words) for hit in here.found] == [
            (hit.score, hit.cosine, hit.words) for hit in there.found
        ]
    named = [[(f"{s.silo}/{s.document}", s.text, s.score) for s in some] for some in federated.sources(found, most)]
    assert named == [[(s.document, s.text, s.score) for s in some] for some in one.sources(expected, most)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> dict[str, Path]:
    return indexes(tmp_path_factory.mktemp("indexes"), embedder)


def opened(made: dict[str, Path], embedder: str, engine: Any = None, **more: Any) -> Finder:
    data = {silo: SiloData((), (), (), corpus=one) for silo, one in corpora(made).items()}
    engine = engine or InProcess(data, {})
    method = Rag(embedder=embedder, **more)
    state = method.begin(engine.reach(0))
    return Finder(method, engine.reach(1), state.told, method.searched_by(state.told, {}))


def named(sources: Sequence[Source]) -> list[str]:
    return [f"{one.silo}/{one.document}" for one in sources]


def test_one_question_and_its_passages(made: dict[str, Path], embedder: str) -> None:
    one = opened(made, embedder, words_share=1.0)
    (result,) = one.find(["which oak grows"])
    assert result.silos == ("north", "south", "west")
    assert result.missing == {}
    (sources,) = one.sources([result], 1)
    assert [source.cited for source in sources] == ["[west/trees.md#Trees]"]
    assert sources[0].text == "An oak grows slowly. A birch grows fast."
    (bare,) = one.sources([result], 1, texts=False)
    assert (bare[0].document, bare[0].text) == ("trees.md", "")


def test_pooled_documents_are_named_by_silo(
    made: dict[str, Path], embedder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    data = {silo: SiloData((), (), (), corpus=one) for silo, one in corpora(made).items()}
    one = opened(made, embedder, InProcess(pooled(data), {}))
    found = {source.document for some in one.sources(one.find(["cat"]), 10) for source in some}
    assert found == {f"{silo}/{name}" for silo, documents in LIBRARIES.items() for name in documents}


def test_a_router_spares_silos(made: dict[str, Path], embedder: str) -> None:
    """By words alone, as these silos are too small to tell means: oak is west's. Each silo sees its own questions alone."""
    heard = list[tuple[str, int]]()

    def record(silo: str, direction: str, data: Any) -> None:
        body = wire.unpack(data)
        if isinstance(body, asking.Search):
            heard.append((silo, len(body.vectors)))

    data = {silo: SiloData((), (), (), corpus=one) for silo, one in corpora(made).items()}
    one = opened(made, embedder, InProcess(data, {}, record=record), route=1)
    results = one.find(["oak", "dog", "birch"])
    assert [result.silos for result in results] == [("west",), ("north",), ("west",)]
    assert sorted(heard) == [("north", 1), ("west", 2)]
    assert named(one.sources(results, 1)[0]) == ["west/trees.md"]


def test_each_silo_its_own_embedder(made: dict[str, Path], embedder: str) -> None:
    """Ranks are fused: of equal ones the silo's name decides."""
    one = opened(made, embedder, merge="ranks", words_share=1.0)
    (result,) = one.find(["cat dog bird oak"])
    assert [hit.silo for hit in result.found[:1]] == ["north"]
    assert 0 < result.found[0].score <= 1


class Losing:
    """An `Ask` that loses what some silos say to some works."""

    def __init__(self, ask: Any, lost: dict[str, set[str]]) -> None:
        self.ask, self.lost = ask, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ask, name)

    def __call__(self, work: Any, body: Any, *, to: Sequence[str] | None = None, deadline: float | None = None) -> Iterator[Any]:
        replies = [one for one in self.ask(work, body, to=to) if one.silo not in self.lost.get(work.__name__, set())]
        if not replies:
            raise RunError("no reply of any could be used")
        return iter(replies)


def test_a_silo_that_does_not_answer_is_named(made: dict[str, Path], embedder: str) -> None:
    one = opened(made, embedder, deadline=3.0, words_share=1.0)
    one.ask = Losing(one.ask, {"search": {"west"}})
    (result,) = one.find(["oak cat"])
    assert set(result.missing) == {"west"}
    assert "within 3 s" in result.missing["west"]
    assert {hit.silo for hit in result.found} == {"north", "south"}


def test_a_silo_lost_between_search_and_fetch_is_made_up_for(made: dict[str, Path], embedder: str) -> None:
    one = opened(made, embedder, words_share=1.0)
    one.ask = Losing(one.ask, {"fetch": {"west"}})
    (result,) = one.find(["oak grows cat"])
    assert result.found[0].silo == "west"
    (sources,) = one.sources([result], 2)
    assert named(sources) == ["south/cats.md", "north/cats.md"] or named(sources) == ["north/cats.md", "south/cats.md"]
    assert set(result.missing) == {"west"}


def test_a_passage_that_is_gone_gives_way_to_the_next(made: dict[str, Path], embedder: str) -> None:
    one = opened(made, embedder, words_share=1.0)
    (result,) = one.find(["oak grows cat"])
    for name in ("west", "north"):  # of all that these found nothing is there any more
        one.ask.engine.desks[name].data.corpus.shown.clear()  # type: ignore[attr-defined]
    (sources,) = one.sources([result], 2)
    assert {source.silo for source in sources} == {"south"}
    assert result.missing == {}


def test_no_silo_answers(made: dict[str, Path], embedder: str) -> None:
    one = opened(made, embedder)
    one.ask = Losing(one.ask, {"search": {"north", "south", "west"}})
    with pytest.raises(RunError, match=r"no silo answered: no reply of any could be used"):
        one.find(["oak"])


def test_of_no_questions_nothing(made: dict[str, Path], embedder: str) -> None:
    assert opened(made, embedder).find([]) == []


def test_a_silo_that_fails_is_left_out_of_what_is_told(made: dict[str, Path], embedder: str) -> None:
    """It has no documents; the others are asked all the same."""
    data: dict[str, SiloData] = {silo: SiloData((), (), (), corpus=one) for silo, one in corpora(made).items()}
    engine = InProcess(data | {"bare": SiloData((), (), ())}, {})
    one = opened(made, embedder, engine)
    assert set(one.told) == {"north", "south", "west"}
    assert [silo for _, silo, _ in engine.rejected] == ["bare"]
    with pytest.raises(SiloError):
        asking.corpus(Silo("bare", SiloData((), (), ()), {}, 0))
