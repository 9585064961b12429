"""How well questions were answered: by hand, and of three silos' documents asked apart and pooled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.baselines import POOLED, pooled
from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import SiloError
from fedtailor.methods.rag import Rag
from fedtailor.models import Resident
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.answerer import Asking, checked
from fedtailor.retrieval.judging import METRICS, document, figures, summary, token_f1
from fedtailor.retrieval.policy import Policy
from libraries import corpora, indexes

ASKED = {  # in the words of the right document
    "north/cats.md": "Where did the black cat sit, on the mat?",
    "north/fish.txt": "Which fish swims?",
    "south/birds.md": "Which bird sang at dawn?",
    "west/trees.md": "Which oak grows slowly, which birch fast?",
}
ROWS = [Row(question, "It did.", name, frame=(0, 0)) for name, question in ASKED.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> Mapping[str, Path]:
    return indexes(tmp_path_factory.mktemp("indexes"), embedder)


def opened(data: Mapping[str, SiloData], base: Resident, method: Rag) -> Asking:
    engine = InProcess(data, {"base": base})
    ask = engine.reach(0)
    return method.serve(method.begin(ask)).open({"base": base}, engine.reach(1))


def silos(made: Mapping[str, Path], policy: Policy | None = None) -> dict[str, SiloData]:
    return {name: SiloData((), (), (), corpus=one) for name, one in corpora(made, policy).items()}


# words


@pytest.mark.parametrize(
    ("told", "reference", "share"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles and punctuation are none
        ("a black cat", "the cat sat down", 2 * 1 / (2 + 3)),
        ("cat cat cat", "cat cat dog", 2 * 2 / (3 + 3)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "the", 0.0),
        ("", "", 1.0),
        ("The!", "a", 1.0),
        ("it's", "its", 1.0),
        ("theatre", "atre", 0.0),
    ],
)
def test_token_f1_by_hand(told: str, reference: str, share: float) -> None:
    assert token_f1(told, reference) == pytest.approx(share)


some = st.lists(st.sampled_from(("cat", "dog", "sat", "the", "The.", "ran,")), max_size=6).map(" ".join)


@given(some, some)
def test_token_f1_is_a_share_that_is_one_of_equals(one: str, other: str) -> None:
    assert 0 <= token_f1(one, other) == token_f1(other, one) <= 1
    assert token_f1(one, one) == 1
    mine, yours = (sorted(text.replace(",", "").lower().replace("the.", "").replace("the", "").split()) for text in (one, other))
    assert (token_f1(one, other) == 1) == (mine == yours)


# documents


def test_a_document_is_called_alike_apart_and_pooled() -> None:
    assert document(Source("north", "a/b.md", "", "", 1.0)) == "north/a/b.md"
    assert document(Source(POOLED, "north/a/b.md", "", "", 1.0)) == "north/a/b.md"


@pytest.mark.parametrize("together", [False, True])
def test_recall_and_rank_by_hand(
    made: Mapping[str, Path], embedder: str, llama: Resident, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By words alone. One passage has the word "bird"; those that do not follow in the order of silos and documents: the two of
    north/cats.md, north/fish.txt, south/cats.md, west/trees.md."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    data = pooled(silos(made)) if together else silos(made)
    model = opened(data, llama, Rag(embedder=embedder, words_share=1.0))
    ranks = {"south/birds.md": 1, "north/cats.md": 2, "north/fish.txt": 4, "south/cats.md": 5, "west/trees.md": 6, "west/no": 0}
    rows = [Row("Bird?", "yes", name) for name in ranks]
    told = figures(model, rows)
    assert told == {
        name: {"recall_at_5": float(0 < rank <= 5), "mrr": 1 / rank if rank else 0.0, "silos_asked": 1.0 if together else 3.0}
        for name, rank in ranks.items()
    }
    assert figures(model, []) == {}


def test_the_question_of_a_chat_is_its_last_turn(made: Mapping[str, Path], embedder: str, llama: Resident) -> None:
    model = opened(silos(made), llama, Rag(embedder=embedder, words_share=1.0))
    turns = {"role": "user", "content": "Fish?"}, {"role": "assistant", "content": "Swims."}, {"role": "user", "content": "Bird?"}
    assert figures(model, [Row("", "yes", "south/birds.md", messages=turns)])["south/birds.md"]["mrr"] == 1.0


def test_who_searches_nothing_is_judged_by_its_answers_alone(made: Mapping[str, Path], embedder: str, llama: Resident) -> None:
    method = Rag(embedder=embedder, max_new_tokens=6)
    model, bare = opened(silos(made), llama, method), method.bare().open({"base": llama})
    for one, more in ((model, {"recall_at_5", "mrr", "silos_asked"}), (bare, set[str]())):
        told = figures(one, ROWS, ROWS[:1])
        assert [set(found) for found in told.values()] == [more | {"token_f1", "rouge_l"}, more, more, more]
        assert told[ROWS[0].id]["token_f1"] == token_f1(one.generate(ROWS[:1])[0], "It did.")


def test_what_a_silo_names_by_a_number_cannot_be_found_by_name(made: Mapping[str, Path], embedder: str, llama: Resident) -> None:
    model = opened(silos(made, Policy(redact=True)), llama, Rag(embedder=embedder, words_share=1.0))
    assert {one["recall_at_5"] for one in figures(model, ROWS).values()} == {0.0}
    names = [one.document for some in model.finder.sources(model.finder.find(["Bird?"]), 6, texts=False) for one in some]
    assert all(re.fullmatch(r"document \d", name) for name in names)


def test_figures_of_silos_and_of_all_rows_by_hand() -> None:
    found = {
        "a/1": {"mrr": 1.0, "token_f1": 0.5}, "a/2": {"mrr": 0.5}, "a/3": {"mrr": 0.0},
        "b/1": {"mrr": 0.25, "token_f1": 0.1}, "b/x/2": {"mrr": 0.25}, "c/1": {},
    }  # fmt: skip
    rows = [Row("q", "r", name) for name in found]
    assert summary(found, rows) == {
        "mrr": {"mean": 0.375, "worst": 0.25, "per_silo": {"a": 0.5, "b": 0.25}, "pooled": 0.4},
        "token_f1": {"mean": pytest.approx(0.3), "worst": 0.1, "per_silo": {"a": 0.5, "b": 0.1}, "pooled": pytest.approx(0.3)},
    }
    assert summary(found, rows[:1])["mrr"] == {"mean": 1.0, "worst": 1.0, "per_silo": {"a": 1.0}, "pooled": 1.0}
    assert summary({}, rows) == {}
    assert set(METRICS) == {"recall_at_5", "mrr", "token_f1", "rouge_l", "silos_asked"}


# questions


@pytest.mark.parametrize(("question", "line"), [(" Who\n sat?\t", "Who sat?"), ("x" * 2000, "x" * 2000), ("東\u3000京", "東 京")])
def test_a_question_is_on_one_line(question: str, line: str) -> None:
    assert checked(question) == line


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ("", "nothing to ask: write a question"),
        (" \n\t", "nothing to ask: write a question"),
        ("x" * 2001, "a question of 2001 letters; 2,000 at most"),
    ],
)
def test_what_is_no_question(question: str, why: str) -> None:
    with pytest.raises(SiloError, match=f"^{why}"):
        checked(question)
