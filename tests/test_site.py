"""silo.toml: what a silo says of itself, laid over what the experiment asks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtailor.data import Data, SiloData
from fedtailor.engines.site import Site, read
from fedtailor.errors import UserError
from fedtailor.limits import Limits, of
from fedtailor.models import Base
from fedtailor.retrieval.policy import Policy
from libraries import indexes

ASKED = Data(source="rows.jsonl", template="{text}:", label="mood", labels=("bad", "good"), silo_column="silo")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shared(tmp_path: Path) -> Data:
    rows = [{"text": f"{s} {i}", "mood": ("bad", "good")[i % 2], "silo": s} for s in ("north", "south") for i in range(40)]
    return Data(**{**ASKED.__dict__, "source": write(tmp_path / "rows.jsonl", rows)})


def test_of_shared_rows_a_silo_takes_its_own(tmp_path: Path) -> None:
    rows = Site("north", server_names_data=True).rows(shared(tmp_path), {}, 0)
    assert len(rows.train + rows.val + rows.test) == 40
    assert all(row.prompt.startswith("north ") for row in rows.train)
    with pytest.raises(UserError, match=r"no row is silo 'nowrth''s; did you mean 'north'\? \(choices: north, south\)"):
        Site("nowrth", server_names_data=True).rows(shared(tmp_path), {}, 0)


def test_its_own_file_is_all_its_own_whatever_it_calls_its_columns(tmp_path: Path) -> None:
    mine = [{"note": f"n {i}", "verdict": ("bad", "good")[i % 2]} for i in range(30)]
    own = {"source": write(tmp_path / "mine.jsonl", mine), "template": "{note}:", "label": "verdict"}
    rows = Site("north", data=own).rows(ASKED, {"max_train": 5, "template": "{ignored}"}, 0)
    assert len(rows.train) == 5, "what the experiment sets for this silo, where its own file says nothing"
    assert rows.train[0].prompt.startswith("n ")
    assert rows.labels == ("bad", "good")


def test_method_settings_of_the_experiment_reach_the_silo(tmp_path: Path) -> None:
    assert Site("north", server_names_data=True).rows(shared(tmp_path), {"rank": 2}, 0).settings == {"rank": 2}


def test_a_misfit_names_the_column(tmp_path: Path) -> None:
    own = {"source": write(tmp_path / "mine.jsonl", [{"note": "x", "mood": "bad"}])}
    with pytest.raises(UserError, match=r"\[data\] template: mine.jsonl has no column 'text' \(choices: mood, note\)"):
        Site("north", data=own).rows(ASKED, {}, 0)


def test_a_base_may_lie_elsewhere() -> None:
    site = Site("north", models={"smollm2-135m": "/models/here"})
    assert site.base(Base("smollm2-135m", "float32")) == Base("/models/here", "float32")
    assert site.base(Base("tiny")) == Base("tiny")


def test_a_model_of_its_own_may_lie_elsewhere_too(tmp_path: Path) -> None:
    site = Site("north", server_names_data=True, models={"minilm": "/models/here"})
    rows = site.rows(shared(tmp_path), {"model": Base("minilm", layers=3), "trainer": {"name": "lora"}}, 0)
    assert rows.settings == {"model": Base("/models/here", layers=3), "trainer": {"name": "lora"}}


def test_public_rows_of_the_server_are_not_looked_for(tmp_path: Path) -> None:
    """The file is the server's: it lies there, and a silo reads no file that a server names."""
    asked = Data(**{**shared(tmp_path).__dict__, "public": "/etc/hostname"})
    assert len(Site("north", server_names_data=True).rows(asked, {}, 0).train) > 20


def test_a_file_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a\n1\n")
    (tmp_path / "silo.toml").write_text('name = "north"\nallow = ["ours"]\n[data]\nsource = "mine.csv"\n')
    found = read(tmp_path / "silo.toml")
    assert found == Site("north", tmp_path / "silo", {"source": str((tmp_path / "mine.csv").resolve())}, allow=("ours",))


def test_all_errors_of_a_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text('nam = "north"\n[data]\ntempalte = "x"\nlabels = ["a"]\n')
    with pytest.raises(UserError) as error:
        read(file)
    lines = str(error.value).splitlines()
    assert [line.removeprefix(f"{file}: ").split(";")[0] for line in lines[:2]] == [
        "no setting 'nam'", "[data] has no setting 'tempalte'",
    ]  # fmt: skip
    assert "[data] has no setting 'labels'" in lines[2], "labels hold for all silos"
    file.write_text('name = "north"\nbody_limit = 0\n')
    with pytest.raises(UserError, match="body_limit: Input should be greater than 0"):
        read(file)
    with pytest.raises(UserError, match="No such file or directory"):
        read(tmp_path / "none.toml")


def test_a_server_cannot_choose_which_file_a_silo_reads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source is missing: a silo names its own rows in silo.toml, .* start with --data ROWS"):
        Site("north").rows(shared(tmp_path), {}, 0)


def test_its_owners_limits_go_with_its_rows_and_the_stricter_holds(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [{"text": f"n {i}", "mood": ("bad", "good")[i % 2]} for i in range(30)])
    file = tmp_path / "silo.toml"
    file.write_text('name = "north"\n[data]\nsource = "mine.jsonl"\n[limits]\nminimum = 5\nepsilon = 4.0\ndelta = 1e-6\n')
    site = read(file)
    assert site.limits == Limits(5, 4.0, 1e-6)
    assert of(site.rows(ASKED, {}, 0)) == site.limits
    assert of(site.rows(ASKED, {"minimum": 7, "epsilon": 9.0}, 0)) == Limits(7, 4.0, 1e-6)
    assert of(site.rows(ASKED, {"minimum": 2, "epsilon": 1.0}, 0)) == Limits(5, 1.0, 1e-6)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("minimun = 5", r"\[limits\] has no setting 'minimun'; did you mean 'minimum'"),
        ("minimum = 0", "limits.minimum"),
        ("epsilon = -1", "limits.epsilon"),
        ("delta = 1.0", "limits.delta"),
    ],
)
def test_limits_that_cannot_be(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "silo.toml").write_text(f'name = "north"\n[limits]\n{line}\n')
    with pytest.raises(UserError, match=why):
        read(tmp_path / "silo.toml")


# documents


@pytest.fixture
def index(tmp_path: Path, embedder: str) -> Path:
    return indexes(tmp_path / "made", embedder)["north"]


def site_of(tmp_path: Path, index: Path, more: str = "") -> Site:
    index.rename(tmp_path / "north.index")
    (tmp_path / "silo.toml").write_text(
        f'name = "north"\n{more}\n[documents]\nindex = "north.index"\nshare = "snippets"\nwords = 40\nwords_per_day = 900\n'
    )
    return read(tmp_path / "silo.toml")


def test_its_documents_lie_beside_its_file_and_its_own_policy_holds(tmp_path: Path, index: Path) -> None:
    """Whatever the experiment says of it: for all silos, or for this one."""
    site = site_of(tmp_path, index, "[limits]\nminimum = 3")
    policy = Policy(index=str(tmp_path / "north.index"), share="snippets", words=40, words_per_day=900)
    assert site.documents == policy
    asked = replace(ASKED, corpus="/etc/{silo}.index", documents=Policy(share="full"))
    found = site.rows(asked, {"documents": {"share": "full"}}, 0)
    assert found == SiloData((), (), (), limits=Limits(minimum=3), corpus=found.corpus), "it is asked about documents alone"
    assert found.corpus is not None
    assert (found.corpus.silo, found.corpus.policy, found.corpus.path) == ("north", policy, tmp_path / "north.index")
    assert len(found.corpus.index().documents()) == 2


def test_rows_of_its_own_come_with_its_documents(tmp_path: Path, index: Path) -> None:
    write(tmp_path / "mine.jsonl", [{"text": f"n {i}", "mood": ("bad", "good")[i % 2]} for i in range(30)])
    site = site_of(tmp_path, index, '[data]\nsource = "mine.jsonl"')
    found = site.rows(ASKED, {"documents": {"share": "full"}, "rank": 2}, 0)
    assert len(found.train) > 15
    assert found.settings == {"rank": 2}
    assert found.corpus is not None
    assert found.corpus.policy == site.documents


def test_who_takes_part_is_not_asked_of_a_silos_own_rows(tmp_path: Path) -> None:
    """The experiment takes some of the silos of one table; here all rows are this silo's."""
    mine = write(tmp_path / "mine.jsonl", [{"text": f"n {i}", "mood": ("bad", "good")[i % 2]} for i in range(30)])
    asked = replace(ASKED, only=("south", "west"))
    assert len(Site("north", data={"source": mine}).rows(asked, {}, 0).train) > 15


def test_no_server_names_what_is_searched(tmp_path: Path) -> None:
    passages = write(tmp_path / "p.jsonl", [{"silo": "north", "document": "d", "text": "A cat."}])
    asked = Data(**{**shared(tmp_path).__dict__, "corpus": passages, "documents": Policy(share="full")})
    mine = Site("north", data={"source": asked.source, "silo_column": "silo"})
    assert mine.rows(asked, {}, 0).corpus is None
    tried = Site("north", server_names_data=True, documents=Policy(share="snippets")).rows(asked, {}, 0)  # all on one machine
    assert tried.corpus is not None
    assert ([one.name for one in tried.corpus.documents], tried.corpus.policy) == (["d"], Policy(share="snippets"))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("[documents]\nshre = 'full'", r"\[documents\] has no setting 'shre'; did you mean 'share'\?"),
        ("[documents]\nshare = 'all'", "documents.share: Input should be 'full', 'shareable', "),
        ("[documents]\nwords = 0", "documents.words: Input should be greater than or equal to 1"),
        ("[documents]\nrecognizer = 'a:b'", "documents: recognizer is set, yet nothing is redacted"),
        ("[documents]\nindex = 3", "documents.index: Input should be a valid string"),
        ("[data]\ndocuments = {share = 'full'}", r"\[data\] has no setting 'documents'"),
        ("documents = 'north.index'", r"documents must be a table, \[documents\], not 'north.index'"),
        ("data = 'rows.jsonl'", r"data must be a table, \[data\], not 'rows.jsonl'"),
        ("limits = 5", r"limits must be a table, \[limits\], not 5"),
    ],
)
def test_documents_that_cannot_be(tmp_path: Path, lines: str, why: str) -> None:
    (tmp_path / "silo.toml").write_text(f'name = "north"\n{lines}\n')
    with pytest.raises(UserError, match=why) as error:
        read(tmp_path / "silo.toml")
    assert "\n" not in str(error.value)


def test_an_index_that_is_not_there_is_told_before_it_is_asked(tmp_path: Path) -> None:
    (tmp_path / "silo.toml").write_text('name = "north"\n[documents]\nindex = "no.index"\n')
    site = read(tmp_path / "silo.toml")
    with pytest.raises(UserError, match=rf"{tmp_path}/no\.index: no index there; make one with `fedtailor index add"):
        site.rows(ASKED, {}, 0)
