"""A silo's documents as the code beside them sees them: one index, made once and whole; what its policy shows of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtailor.baselines import POOLED, pooled
from fedtailor.data import SiloData
from fedtailor.errors import SiloError, UserError
from fedtailor.models import Resident
from fedtailor.retrieval import embedding
from fedtailor.retrieval.corpus import Corpus, base_name
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.ledger import Ledger
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.reading import Document, Section
from fedtailor.retrieval.scoring import question, statistics
from fedtailor.retrieval.store import Vectors
from fedtailor.tiny import _module
from libraries import LIBRARIES, corpora, indexes

TEXTS = {"a.md": "A cat sat. " * 40, "b.md": "A dog ran.", "c.md": "A bird sang."}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(embedder: str) -> Embedder:
    return embedding.resident(embedder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, resident_of: object) -> Embedder:
    """Of other weights."""
    folder = tmp_path_factory.mktemp("other")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        _module("bert").save_pretrained(folder)
    assert callable(resident_of)
    bert: Resident = resident_of("bert")
    bert.save_reader(folder)
    return embedding.resident(str(folder))


@dataclass(frozen=True)
class Failing(Embedder):
    """Breaks in the middle: at a text with this word."""

    at: str = ""

    def passages(self, texts: Sequence[str]) -> Vectors:
        if any(self.at in text for text in texts):
            raise RuntimeError("out of memory")
        return super().passages(texts)


@dataclass(frozen=True)
class Turned(Embedder):
    """As if trained from another: its vectors the other way round."""

    origin: Embedder | None = None

    @property
    def base(self) -> Embedder:
        assert self.origin is not None
        return self.origin

    def passages(self, texts: Sequence[str]) -> Vectors:
        return -super().passages(texts)


def turned(model: Embedder, number: int) -> Turned:
    return Turned(model.model, "turned", f"{number:064}", model)


def table(texts: Mapping[str, str] = TEXTS) -> Corpus:
    return Corpus("north", documents=[Document(name, f"sha of {text}", (Section(("T",), text),)) for name, text in texts.items()])


def files(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.glob("**/*") if path.is_file())


# an index of a table


def test_it_is_made_once_and_found_again(cache: Path, model: Embedder) -> None:
    with table().index(model) as index:
        assert {name: sha for name, (sha, _) in index.documents().items()} == {name: f"sha of {t}" for name, t in TEXTS.items()}
        passages, vectors = index.document("a.md")
        assert len(passages) > 1
        assert np.array_equal(vectors, model.passages([one.indexed for one in passages]))
    (name,) = files(cache)
    assert name.startswith("indexes/")
    made = (cache / name).stat()
    with table().index(Failing(model.model, model.name, model.sha256, at="")) as again:  # which can embed nothing
        assert again.status().passages == index_passages(cache / name)
    assert ((cache / name).stat().st_ino, (cache / name).stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def index_passages(path: Path) -> int:
    with Corpus("x", path=path).index() as index:
        return index.status().passages


def test_other_documents_or_another_embedder_make_another(cache: Path, model: Embedder, other: Embedder) -> None:
    for corpus, by in ((table(), model), (table(), other), (table({**TEXTS, "b.md": "A dog slept."}), model)):
        corpus.index(by).db.close()
    assert len(files(cache)) == 3
    held = table()
    held.policy = Policy(share="snippets")
    held.index(model).db.close()
    assert len(files(cache)) == 3, "whatever may leave of it, it is the same"


def test_one_that_broke_off_is_not_taken_for_one(cache: Path, model: Embedder) -> None:
    for at in ("dog", "bird"):
        with pytest.raises(RuntimeError, match="out of memory"):
            table().index(Failing(model.model, model.name, model.sha256, at=at))
        assert files(cache) == []
    with table().index(model) as index:
        assert set(index.documents()) == set(TEXTS)


KILLED = """
import sys, time
from fedtailor.retrieval import embedding
from fedtailor.retrieval.corpus import Corpus, base_name
from fedtailor.retrieval.reading import Document, Section
from fedtailor.retrieval.store import Store
before = Store.put
def put(*given, **more):
    before(*given, **more)
    print("put", flush=True)
    time.sleep(60)
Store.put = put
texts = {texts!r}
documents = [Document(name, "sha of " + text, (Section(("T",), text),)) for name, text in texts.items()]
Corpus("north", documents=documents).index(embedding.resident({embedder!r}))
"""


def test_one_that_was_killed_is_not_taken_for_one(cache: Path, model: Embedder, embedder: str) -> None:
    """After the first of its documents was written."""
    code = KILLED.format(texts=TEXTS, embedder=embedder)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "put\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not list(cache.glob("indexes/*"))
    assert list(cache.glob(".fetch-*/*.index")), "it was on its way"
    with table().index(model) as index:
        assert set(index.documents()) == set(TEXTS)


def test_before_it_is_told_of_the_embedder_there_is_none(cache: Path) -> None:
    for ask in (lambda: table().index(), lambda: table().searcher("0" * 64)):
        with pytest.raises(SiloError, match="its documents are in no index yet"):
            ask()


# all silos' as one


def test_pooled_documents_are_named_by_their_silo_and_have_the_same_vectors(
    cache: Path, tmp_path: Path, embedder: str, model: Embedder
) -> None:
    made = indexes(tmp_path, embedder)
    data = {silo: SiloData((), (), (), corpus=corpus) for silo, corpus in corpora(made, Policy(share="answers")).items()}
    whole = pooled(data)[POOLED].corpus
    assert whole is not None
    assert (whole.silo, whole.policy) == (POOLED, Policy())
    index = whole.index(model)
    assert set(index.documents()) == {f"{silo}/{name}" for silo, some in LIBRARIES.items() for name in some}
    for silo, path in made.items():
        part = Corpus(silo, path=path).index()
        for name, (sha256, _) in part.documents().items():
            assert index.documents()[f"{silo}/{name}"] == (sha256, "")
            (mine, vectors), (theirs, others) = index.document(f"{silo}/{name}"), part.document(name)
            assert mine == theirs
            assert np.array_equal(vectors, others)
    assert len(whole.told(model).table().ids) == 6
    assert whole.sha256() != Corpus(POOLED, parts={"north": Corpus("north", path=made["north"])}).sha256()


def test_indexes_of_two_embedders_cannot_be_one(cache: Path, tmp_path: Path, model: Embedder, other: Embedder) -> None:
    one, two = (indexes(tmp_path / name, name_of) for name, name_of in (("one", model.name), ("two", other.name)))
    mixed = Corpus(POOLED, parts={"north": Corpus("north", path=one["north"]), "south": Corpus("south", path=two["south"])})
    with pytest.raises(SiloError) as error:
        mixed.index(model)
    told = f"silo 'south': its index's vectors are by {base_name(other.name)!r} ({other.sha256[:12]}), asked is"
    assert str(error.value).startswith(told)
    assert f"{model.name!r} ({model.sha256[:12]}): set method.embedder, or make a new index" in str(error.value)
    assert not list(cache.glob("indexes/*"))


# an embedder


def test_an_index_by_another_embedder_is_refused_with_both_names(tmp_path: Path, model: Embedder, other: Embedder) -> None:
    corpus = Corpus("north", path=indexes(tmp_path, model.name)["north"])
    assert corpus.told(model) is corpus.searcher(model.sha256)
    for asked in (other, turned(other, 1)):
        with pytest.raises(SiloError) as error:
            corpus.told(asked)
        assert str(error.value) == (
            f"its index's vectors are by {base_name(model.name)!r} ({model.sha256[:12]}), asked is {asked.name!r} "
            f"({other.sha256[:12]}): set method.embedder, or make a new index with --embedder"
        )
    with pytest.raises(SiloError, match=f"by {base_name(model.name)!r} .*asked is 'another' .{'9' * 12}"):
        corpus.searcher("9" * 64)


def test_by_one_that_was_trained_every_passage_is_embedded_once(tmp_path: Path, model: Embedder) -> None:
    corpus = Corpus("north", path=indexes(tmp_path, model.name)["north"])
    rounds = [turned(model, number) for number in range(1, 8)]
    for trained in rounds:
        assert np.array_equal(corpus.told(trained).table().vectors, -corpus.told(model).table().vectors)
        assert {model.sha256, trained.sha256} <= corpus.index().embedders()
    assert corpus.index().embedders() == {model.sha256, *(one.sha256 for one in rounds[-5:])}, "the first are gone"
    before = corpus.index().about("version")
    corpus.told(rounds[-1])
    assert corpus.index().about("version") == before
    corpus.index().put("new.md", "s", *corpus.index().document("fish.txt"), "now")
    assert len(corpus.told(rounds[-1]).table().ids) == 4, "one that came since has its vector, too"
    with pytest.raises(SiloError, match="asked is 'another'"):
        Corpus("north", path=corpus.path).searcher(rounds[0].sha256)


# what a policy shows


def test_of_shareable_documents_alone_passages_are_searched_and_shown(tmp_path: Path, model: Embedder) -> None:
    path = indexes(tmp_path, model.name)["north"]
    whole, tagged = Corpus("north", path=path), Corpus("north", Policy(share="shareable"), path)
    asked = question("fish", model.questions(["fish"])[0], statistics(whole.index()))
    for corpus in (whole, tagged):
        corpus.show("me", (1, 2, 3, 99))
    assert [whole.passage(at, "me")[1] for at in (1, 2, 3)] == ["cats.md", "cats.md", "fish.txt"]  # type: ignore[index]
    assert [tagged.passage(at, "me") for at in (1, 2, 3)] == [whole.passage(1, "me"), whole.passage(2, "me"), None]
    assert {one.at for one in whole.told(model).search(asked, 9)} == {1, 2, 3}
    assert {one.at for one in tagged.told(model).search(asked, 9)} == {1, 2}
    whole.index().share(["fish.txt"], True)
    whole.index().share(["cats.md"], False)
    assert {one.at for one in tagged.told(model).search(asked, 9)} == {3}
    assert [tagged.passage(at, "me") is None for at in (1, 2, 3)] == [True, True, False]
    whole.index().remove("fish.txt")
    assert (whole.passage(3, "me"), whole.passage(99, "me"), tagged.passage(3, "me")) == (None, None, None)


def test_what_is_told_is_booked_beside_the_index_and_limits_bind(tmp_path: Path, embedder: str) -> None:
    path, policy = indexes(tmp_path, embedder)["north"], Policy(questions_per_hour=2, words_per_day_all=10)
    corpus = Corpus("north", policy, path)
    corpus.book("me", questions=2)
    corpus.book("me", words=8)
    with pytest.raises(SiloError, match=r"questions_per_hour = 2 for 'me': 1 more questions would pass it"):
        corpus.book("me", questions=1)
    corpus.book("you", questions=1)
    again = Corpus("north", policy, path)  # another process, or this one after a restart
    with pytest.raises(SiloError, match=r"words_per_day_all = 10 over all askers: 3 more words would pass it"):
        again.book("you", words=3)
    again.book("you", words=2)
    with Ledger(path.with_name("north.index.asked")) as ledger:
        left = [ledger.left(policy, asker, time.time()) for asker in ("me", "you")]
    assert [(one.questions, one.words) for one in left] == [(0, 0), (1, 0)]


def test_a_table_s_questions_are_not_counted(cache: Path, model: Embedder) -> None:
    """It is there to try things out: whoever runs the experiment has the table."""
    corpus = table()
    corpus.policy = Policy(questions_per_hour=1)
    corpus.index(model)
    for _ in range(3):
        corpus.book("me", questions=1)
    assert [name for name in files(cache) if name.endswith("asked")] == []


def test_an_index_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.index: no index there; make one with"):
        Corpus("north", path=tmp_path / "no.index").index()
