"""A table's passages, or each silo's own index: whose documents are which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.errors import UserError
from fedtailor.retrieval.corpora import read
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.reading import Document, Section

Table = Sequence[Mapping[str, Any]]
PASSAGES = (
    {"silo": "north", "document": "cats.md", "section": "Cats", "text": "A cat sat."},
    {"silo": "south", "document": "cats.md", "section": None, "text": "No cat."},
    {"silo": "north", "document": "bees.md", "section": "", "text": " A bee. "},
    {"silo": "north", "document": "cats.md", "section": "Dogs", "text": "A dog ran."},
    {"silo": "west", "document": "oak.md", "section": "", "text": "An oak."},
)


def write(path: Path, rows: Table) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def corpora(source: str, *silos: str, column: str = "silo", **policy: Any) -> dict[str, Corpus]:
    return read(source, column, silos, dict.fromkeys(silos, Policy(**policy)))


def problem(source: str, *silos: str, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        corpora(source, *silos, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def held(corpus: Corpus) -> dict[str, list[tuple[str, str]]]:
    return {one.name: [(section.name, section.text) for section in one.sections] for one in corpus.documents}


def test_rows_of_one_document_are_its_sections(tmp_path: Path) -> None:
    found = corpora(write(tmp_path / "p.jsonl", PASSAGES), "north", "south")
    assert list(found) == ["north", "south"], "of others nothing is held"
    assert {name: held(one) for name, one in found.items()} == {
        "north": {"bees.md": [("", "A bee.")], "cats.md": [("Cats", "A cat sat."), ("Dogs", "A dog ran.")]},
        "south": {"cats.md": [("", "No cat.")]},
    }
    assert [type(one) for one in found["north"].documents] == [Document, Document]
    assert found["south"].documents[0].sections == (Section((), "No cat."),)
    assert (found["north"].path, found["north"].silo) == (None, "north")


def test_each_silo_has_its_own_policy(tmp_path: Path) -> None:
    policies = {"north": Policy(share="snippets", words=5), "south": Policy()}
    found = read(write(tmp_path / "p.jsonl", PASSAGES), "silo", ["north", "south"], policies)
    assert {name: one.policy for name, one in found.items()} == policies


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([{"document": 0}, {"document": 1}, {"document": 0}], ["0", "1"]),  # a number is a name, 0 too
        ([{"id": "x"}, {"id": "y"}], ["x", "y"]),
        ([{"document": "d", "id": "x"}, {"document": None, "id": "y"}, {"document": " ", "id": 0}], ["0", "d", "y"]),
        ([{}, {}], ["row 1", "row 2"]),
    ],
)
def test_how_documents_are_called(tmp_path: Path, rows: Table, names: list[str]) -> None:
    source = write(tmp_path / "p.jsonl", [{"silo": "a", "text": "A cat.", "document": None, "id": None, **row} for row in rows])
    assert [one.name for one in corpora(source, "a")["a"].documents] == names


def test_equal_documents_have_equal_hashes(tmp_path: Path) -> None:
    def sha256(name: str, rows: Table) -> str:
        return corpora(write(tmp_path / name, rows), "north")["north"].sha256()

    one = sha256("one.jsonl", PASSAGES)
    assert sha256("two.jsonl", [PASSAGES[i] for i in (4, 2, 0, 1, 3)]) == one, "others' rows, and documents in another order"
    for change in ({"document": "dogs.md"}, {"section": "Cat"}, {"text": "A cat sat!"}):
        assert sha256("other.jsonl", [{**PASSAGES[0], **change}, *PASSAGES[1:]]) != one
    assert sha256("turned.jsonl", [PASSAGES[i] for i in (3, 1, 2, 0)]) != one, "sections in another order"
    assert sha256("cut.jsonl", PASSAGES[1:]) != one


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 99)), min_size=1, max_size=12))
def test_every_passage_is_in_one_document_of_its_silo(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]]
) -> None:
    table = [{"silo": s, "document": d, "text": f"t {n}"} for s, d, n in rows]
    source = write(tmp_path_factory.mktemp("table") / "p.jsonl", table)
    for silo in {s for s, _, _ in rows}:
        assert held(corpora(source, silo)[silo]) == {
            name: [("", f"t {n}") for s, d, n in rows if (s, d) == (silo, name)]
            for name in sorted({d for s, d, _ in rows if s == silo})
        }


def test_what_is_no_table_of_passages(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", PASSAGES)
    assert problem(source, "north", "nowrth").startswith("[data] corpus: p.jsonl has no passage of silo 'nowrth'; add some")
    assert problem(source, "north", column="shop") == (
        "[data] corpus silo_column: p.jsonl has no column 'shop' (choices: document, section, silo, text)"
    )
    assert problem(source, "north", column="").startswith("[data] corpus: whose each passage of p.jsonl is says silo_column")
    bare = write(tmp_path / "bare.jsonl", [{"silo": "north", "texts": "A cat."}])
    assert problem(bare, "north").startswith("[data] corpus text: bare.jsonl has no column 'text'; did you mean 'texts'?")
    empty = write(tmp_path / "empty.jsonl", [*PASSAGES, {**PASSAGES[0], "text": " "}])
    assert problem(empty, "north") == "empty.jsonl line 6: the passage (column 'text') is empty; fill it in, or remove the row"
    assert problem(str(tmp_path / "no.jsonl"), "north").startswith(f"[data] corpus '{tmp_path}/no.jsonl': there is no such file")
    assert problem(source, "north", share="shareable").startswith("[data] documents: share = 'shareable', and no passage of")


def test_each_silo_s_own_index_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = corpora(str(tmp_path / "{silo}" / "{silo}.index"), "north", "south", share="shareable")
    assert {name: one.path for name, one in found.items()} == {
        name: tmp_path / name / f"{name}.index" for name in ("north", "south")
    }
    assert found["north"].tagged
    with pytest.raises(UserError, match=r"north\.index: no index there; make one with `fedtailor index add"):
        found["north"].sha256()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("{silo}.index", "~/{silo}.index"):
        assert corpora(source, "north")["north"].path == tmp_path / "north.index"
