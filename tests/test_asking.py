"""What a silo tells when its documents are asked about; what each policy lets out, read off the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import SiloError
from fedtailor.methods.rag import Rag
from fedtailor.models import Resident
from fedtailor.packed import Packed
from fedtailor.retrieval import asking, embedding
from fedtailor.retrieval.asking import Fetch, Hits, Passages, Say, Saying, Search, Tell, Told
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.scoring import statistics
from fedtailor.retrieval.terms import terms
from libraries import LIBRARIES, indexes

LATE = "bird dawn"


def silo(corpus: Corpus | None, **models: Any) -> Silo:
    return Silo("south", SiloData((), (), (), corpus=corpus), models, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> dict[str, Path]:
    return indexes(tmp_path_factory.mktemp("indexes"), embedder)


def told(corpus: Corpus, embedder: str, **more: Any) -> Told:
    sha256 = embedding.resident(embedder).sha256
    return asking.tell(silo(corpus), Tell(embedder, sha256, sha256, **more))


def searching(embedder: str, text: str, **more: Any) -> Search:
    model = embedding.resident(embedder)
    vectors = torch.from_numpy(model.questions([text]))
    weights = asking.words([dict.fromkeys(terms(text), 1.0)])
    return replace(Search("me", model.sha256, vectors, weights, 5.0, 0.3, 10), **more)


def test_a_silo_tells_counts_of_hashed_words(made: dict[str, Path], embedder: str) -> None:
    found = told(Corpus("south", Policy(), made["south"]), embedder)
    (cat,) = terms("cat")
    assert found.problem(Tell("", "", found.sha256)) is None
    assert found.statistics.having[cat] == 1
    assert (found.passages, found.keeps, found.centroids.shape[0]) == (2, False, 0)
    with Corpus("south", Policy(), made["south"]).index() as index:
        assert found.statistics == statistics(index)


def test_a_silo_may_keep_its_counts(made: dict[str, Path], embedder: str) -> None:
    found = told(Corpus("south", Policy(statistics=False), made["south"]), embedder)
    assert len(found.terms) == 0
    assert found.passages == 2, "how long passages are on the whole is needed for scores"


def test_hits_hold_numbers_alone(made: dict[str, Path], embedder: str) -> None:
    corpus = Corpus("south", Policy(), made["south"])
    body = searching(embedder, LATE)
    up = asking.search(silo(corpus), body)
    assert up.problem(body) is None
    (found,) = up.found("south", 0.3)
    assert [one.place for one in found] == [0, 1]
    best = max(found, key=lambda one: one.words)
    passages = asking.fetch(silo(corpus), Fetch("me", torch.tensor([best.at]), body.words, torch.tensor([0], dtype=torch.int32)))
    assert passages.documents == ("birds.md",)
    assert passages.sections == ("Birds",)
    assert passages.texts[0].startswith("The bird sang")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cosine": torch.tensor([0.5, 2.0], dtype=torch.float64)}, "out of bounds"),
        ({"words": torch.tensor([0.5, float("nan")], dtype=torch.float64)}, "out of bounds"),
        ({"words": torch.tensor([0.5], dtype=torch.float64)}, "one for each candidate"),
        ({"ends": torch.tensor([3], dtype=torch.int32)}, "one for each candidate"),
        ({"ends": torch.tensor([2.0])}, "another type"),
        ({"at": torch.tensor([[1], [2]])}, "another type"),
        ({"at": torch.tensor([2, 2])}, "a candidate twice"),
        ({"at": torch.tensor([1, 2], dtype=torch.int32)}, "another type"),
    ],
)
def test_hits_that_must_not_be_used(embedder: str, change: dict[str, Any], why: str) -> None:
    fine = Hits(
        torch.tensor([1, 2]), torch.tensor([0.5, 0.4], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64),
        torch.tensor([2], dtype=torch.int32),
    )  # fmt: skip
    asked = searching(embedder, "cat")
    assert fine.problem(asked) is None
    assert why in str(replace(fine, **change).problem(asked))
    assert "more candidates" in str(fine.problem(replace(asked, most=0)))


def test_counts_that_must_not_be_used() -> None:
    fine = Told("e", "s", 3, 9, torch.tensor([4]), torch.tensor([2], dtype=torch.int32), torch.zeros(1, 4))
    asked = Tell("e", "s", "s", centroids=1)
    assert fine.problem(asked) is None
    assert "out of bounds" in str(replace(fine, having=torch.tensor([4], dtype=torch.int32)).problem(asked))
    assert "go together" in str(replace(fine, terms=torch.tensor([4, 5])).problem(asked))
    assert "not finite" in str(replace(fine, centroids=torch.tensor([[float("inf")]])).problem(asked))
    assert "not finite" in str(replace(fine, centroids=torch.tensor([[3e38]])).problem(asked))
    assert "other types" in str(replace(fine, passages=float("nan")).problem(asked))
    assert "go together" in str(replace(fine, terms=torch.tensor([[4]])).problem(asked))
    assert "another embedder" in str(replace(fine, sha256="other").problem(asked))
    assert "asked 0" in str(fine.problem(replace(asked, centroids=0)))
    assert Passages(("a",), ("",), ("t",)).problem(Fetch("me", torch.tensor([1, 2]), asking.words([]), torch.tensor([0, 0])))
    fetched = Fetch("me", torch.tensor([1]), asking.words([]), torch.tensor([0]))
    assert Passages(("a",), ("",), ("t" * 50_001,)).problem(fetched)
    assert Passages(("a",), ("",), (7,)).problem(fetched)  # type: ignore[arg-type]
    assert Saying("x" * 101).problem(Say("me", "q", torch.tensor([1]), 1))


def test_a_silo_without_documents(embedder: str) -> None:
    with pytest.raises(SiloError, match="no documents: set index under"):
        asking.search(silo(None), searching(embedder, "cat"))


def test_another_embedder(made: dict[str, Path], embedder: str) -> None:
    """The asker's has other weights than the silo's of the same name; or the silo's index is by another."""
    with pytest.raises(SiloError, match="has other weights"):
        asking.tell(silo(Corpus("south", Policy(), made["south"])), Tell(embedder, "0" * 64, "0" * 64))
    with pytest.raises(SiloError, match=r"its index's vectors are by .* asked is 'another'"):
        asking.search(silo(Corpus("south", Policy(), made["south"])), searching(embedder, "cat", sha256="0" * 64))


def test_a_passage_that_is_gone_is_told_as_nothing(made: dict[str, Path], embedder: str) -> None:
    body = Fetch("me", torch.tensor([10_000]), asking.words([{}]), torch.tensor([0], dtype=torch.int32))
    assert asking.fetch(silo(Corpus("south", Policy(), made["south"])), body) == Passages(("",), ("",), ("",))


def test_limits_hold_over_restarts(tmp_path: Path, embedder: str) -> None:
    path = indexes(tmp_path, embedder)["south"]
    policy = Policy(questions_per_hour=2, words_per_day_all=10)
    for _ in range(2):
        asking.search(silo(Corpus("south", policy, path)), searching(embedder, "cat"))
    with pytest.raises(SiloError, match="questions_per_hour"):
        asking.search(silo(Corpus("south", policy, path)), searching(embedder, "cat"))
    other, corpus = searching(embedder, LATE, asker="another"), Corpus("south", policy, path)
    up = asking.search(silo(corpus), other)
    body = Fetch("another", up.at[:1], other.words, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(SiloError, match="words_per_day_all"):
        asking.fetch(silo(corpus), body)


def test_what_was_not_found_is_not_told(made: dict[str, Path], embedder: str) -> None:
    """By its number alone no passage leaves, and what one asker found is another's to find for itself."""
    corpus, body = Corpus("south", Policy(), made["south"]), searching(embedder, LATE)
    numbers, first = torch.tensor([1, 2]), torch.tensor([0, 0], dtype=torch.int32)
    assert asking.fetch(silo(corpus), Fetch("me", numbers, body.words, first)).documents == ("", "")
    asking.search(silo(corpus), replace(body, most=1, words_share=1.0))
    found = asking.fetch(silo(corpus), Fetch("me", numbers, body.words, first)).documents
    assert "birds.md" in found
    assert asking.fetch(silo(corpus), Fetch("you", numbers, body.words, first)).documents == ("", "")
    with pytest.raises(SiloError, match="from 1 to 1000"):
        asking.search(silo(corpus), replace(body, most=-1))
    with pytest.raises(SiloError, match="1000 at most"):
        asking.fetch(silo(corpus), Fetch("me", torch.ones(1001).long(), body.words, torch.zeros(1001).int()))


@pytest.mark.parametrize("share", ["full", "shareable", "redacted", "snippets"])
def test_no_silo_answers_by_itself_but_one_that_shares_answers(
    made: dict[str, Path], embedder: str, llama: Resident, share: Any
) -> None:
    corpus = Corpus("south", Policy(share=share), made["south"])
    up = asking.search(silo(corpus), searching(embedder, LATE))
    with pytest.raises(SiloError, match="does not answer by itself"):
        asking.say(silo(corpus, base=llama), Say("me", "who sang?", up.at, 8))


def test_answers_are_redacted_before_and_after(
    made: dict[str, Path], embedder: str, llama: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that repeats what it reads: neither does it read a name, nor does one leave that it knew."""
    seen = list[str]()

    def echo(resident: Any, question: str, sources: Any, most: int) -> str:
        seen.extend(source.text for source in sources)
        return " ".join([*seen, "Bob Ray, 555-9876"])

    monkeypatch.setattr(asking.writing, "answer", echo)
    corpus = Corpus("south", Policy(share="answers", redact=True), made["south"])
    up = asking.search(silo(corpus), searching(embedder, LATE))
    told = asking.say(silo(corpus, base=llama), Say("me", "who sang?", up.at, 8)).text
    assert "sang at dawn" in told
    assert not any(part in text for text in (told, *seen) for part in ("Ann", "Lee", "1234", "9876"))
    assert "Bob" not in told


def test_answering_is_booked_before_anything_is_written(made: dict[str, Path], embedder: str, tmp_path: Path) -> None:
    path = indexes(tmp_path, embedder)["south"]
    corpus = Corpus("south", Policy(share="answers", questions_per_hour=1), path)
    up = asking.search(silo(corpus), searching(embedder, LATE))
    with pytest.raises(SiloError, match="questions_per_hour"):
        asking.say(silo(corpus), Say("me", "who sang?", up.at, 8))  # there is no model: none was asked


def test_of_words_that_are_hidden_nothing_is_told(made: dict[str, Path], embedder: str) -> None:
    """Neither how many passages have a name or a number, nor which."""
    corpus = Corpus("south", Policy(share="redacted"), made["south"])
    hidden = {next(iter(terms(word))) for word in ("Ann", "Lee", "555", "1234")}
    found = told(corpus, embedder)
    assert not hidden & set(found.terms.tolist())
    assert next(iter(terms("dawn"))) in found.terms.tolist()
    up = asking.search(silo(corpus), searching(embedder, "Ann Lee 555 1234"))
    assert up.words.tolist() == [0.0] * len(up.words)
    assert next(iter(terms("name"))) not in found.terms.tolist(), "what stands in their place is no word of the documents"


def test_a_name_that_is_a_word_elsewhere_is_found_there_alone(tmp_path: Path, embedder: str) -> None:
    texts = {"a.md": "Yesterday old Rose Brown called the ward.", "b.md": "A rose is brown in autumn, said the gardener."}
    path = indexes(tmp_path, embedder, {"south": texts})["south"]
    corpus = Corpus("south", Policy(share="redacted"), path)
    assert next(iter(terms("rose"))) in told(corpus, embedder).terms.tolist()
    up = asking.search(silo(corpus), searching(embedder, "rose"))
    assert [bool(score) for score in up.words.tolist()] == [False, True]


def test_a_policy_bounds_what_is_told_for_routing(tmp_path: Path, embedder: str) -> None:
    """However many means a server asks for; and the same index tells the same, so that no mean of many helps."""
    many = {"west": {"a.md": "".join(f"# Part {i}\nOak number {i} grows.\n\n" for i in range(40))}}
    path = indexes(tmp_path, embedder, many)["west"]
    corpus = Corpus("west", Policy(centroids=2, noise=1.0), path)
    first, again = (told(corpus, embedder, centroids=10**6).centroids for _ in range(2))
    assert len(first) == 2
    assert torch.equal(told(corpus, embedder, centroids=1).centroids, first[:1]), "no other draw, whatever is asked"
    assert torch.equal(first, again)
    plain = told(Corpus("west", Policy(centroids=2, noise=0.0), path), embedder, centroids=10**6).centroids
    assert not torch.allclose(first, plain, atol=1e-3)


def test_where_a_silos_files_lie_stays_there(tmp_path: Path, embedder: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SiloError, match="its own log says why") as error:
        asking.search(silo(Corpus("south", Policy(), tmp_path / "gone.index")), searching(embedder, "cat"))
    assert str(tmp_path) not in str(error.value)
    assert str(tmp_path) in caplog.text


def test_a_damaged_index_is_its_silos_failure(tmp_path: Path, embedder: str) -> None:
    path = indexes(tmp_path, embedder)["south"]
    corpus = Corpus("south", Policy(), path)
    corpus.index().db.execute("drop table passages")
    with pytest.raises(SiloError, match="its index cannot be read"):
        asking.search(silo(corpus), searching(embedder, "cat"))


def texts(value: Any) -> Iterator[str]:
    """All texts of a body."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for one in pair for text in texts(one))
    elif isinstance(value, tuple | list):
        yield from (text for one in value for text in texts(one))
    elif is_dataclass(value):
        yield from (text for one in fields(value) for text in texts(getattr(value, one.name)))


@dataclass
class Wire:
    """Every message of an engine, as bytes, by direction."""

    up: list[tuple[str, bytes]] = field(default_factory=list)
    down: list[tuple[str, bytes]] = field(default_factory=list)

    def __call__(self, silo: str, direction: str, data: Packed) -> None:
        getattr(self, direction).append((silo, bytes(data)))

    def holds(self, text: str, direction: str = "up", silo: str = "south") -> bool:
        """In the bytes as they stand, or in a text that they are read as, which may be written otherwise."""
        every = [data for name, data in getattr(self, direction) if name == silo]
        return any(text.encode() in data or any(text in one for one in texts(wire.unpack(data))) for data in every)


@pytest.fixture
def heard(made: dict[str, Path], embedder: str, llama: Resident) -> Callable[[Policy, str], tuple[Wire, list[Any]]]:
    def asked(policy: Policy, question: str) -> tuple[Wire, list[Any]]:
        record = Wire()
        data = {name: SiloData((), (), (), corpus=Corpus(name, policy, path)) for name, path in made.items()}
        engine = InProcess(data, {"base": llama}, record=record)
        method = Rag(embedder=embedder, floor=0.0, max_new_tokens=4, candidates=20, passages=10)
        served = method.serve(method.begin(engine.reach(0)))
        answers = list(served.open({"base": llama}, engine.reach(1)).ask(question))
        return record, list(answers[-1].sources)

    return asked


SENTENCE = "The bird sang at dawn. Ann Lee heard it, call 555-1234."
QUESTION = "Where is the dawn choir of one bird?"


def pieces(text: str, size: int) -> Iterator[str]:
    words = text.split()
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def test_in_full(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    record, sources = heard(Policy(), QUESTION)
    assert record.holds(SENTENCE)
    assert record.holds("birds.md")
    assert not record.holds("choir", "down"), "a question goes as numbers"
    assert any(source.cited == "[south/birds.md#Birds]" for source in sources)


def test_shareable_alone(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    """cats.md has the tag; of birds.md no word, no name, no count and no score leaves."""
    record, sources = heard(Policy(share="shareable"), QUESTION)
    assert record.holds("No cat here.")
    assert not any(record.holds(part) for part in ("birds", "Birds", "dawn", "Ann", "555", *pieces(SENTENCE, 2)))
    assert {source.document for source in sources} == {"cats.md"}
    (tells,) = (told for name, data in record.up if name == "south" and isinstance(told := wire.unpack(data), Told))
    assert next(iter(terms("dawn"))) not in tells.terms.tolist()
    assert tells.passages == 1


def test_redacted(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    record, sources = heard(Policy(share="redacted"), QUESTION)
    assert record.holds("sang at dawn")
    assert not any(record.holds(part) for part in ("Ann", "Lee", "555", "1234", "birds.md", "Birds"))
    assert any("[number]" in source.text for source in sources)


def test_snippets(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    """The four words around what was asked for; no five words of any document."""
    record, _ = heard(Policy(share="snippets", words=4), QUESTION)
    assert record.holds("dawn")
    every = [text for documents in LIBRARIES.values() for text in documents.values()]
    plain = [" ".join(line for line in text.splitlines() if line[:1] != "#") for text in every]
    assert any(record.holds(part, silo=name) for name in LIBRARIES for text in plain for part in pieces(text, 4))
    assert not any(record.holds(part, silo=name) for name in LIBRARIES for text in plain for part in pieces(text, 5))


def test_answers_alone(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    """The silo's own model writes, here one of random weights: no word of the documents, no name of any. The question is told."""
    record, sources = heard(Policy(share="answers"), QUESTION)
    assert not any(record.holds(part, silo=name) for name in LIBRARIES for part in ("birds.md", "cats.md", "trees.md"))
    assert not any(record.holds(part) for part in pieces(SENTENCE, 2))
    assert record.holds("choir", "down")
    assert all(source.document == "" and source.section == "" for source in sources)
    assert any(isinstance(wire.unpack(data), Saying) for _, data in record.up)


def test_what_went_up_is_the_bodies_of_this_file_alone(heard: Callable[[Policy, str], tuple[Wire, list[Any]]]) -> None:
    for share in ("full", "shareable", "redacted", "snippets", "answers"):
        record, _ = heard(Policy(share=share), QUESTION)
        assert {type(wire.unpack(data)) for _, data in record.up} <= {Told, Hits, Passages, Saying}
