"""`fedtailor ask` over index files and finished runs: what is shown, and every way of asking wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Ended, fails
from fedtailor import experiment, runs
from libraries import indexes
from test_rag import written

Command = Callable[..., Ended]


def settings(embedder: str) -> list[str]:
    sets = [f"method.embedder={embedder}", "method.floor=0.0", "method.words_share=0.9", "method.max_new_tokens=4"]
    return ["--model", "tiny", *(word for one in sets for word in ("--set", one))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> list[str]:
    found = indexes(tmp_path_factory.mktemp("indexes"), embedder)
    return [word for silo, path in found.items() for word in ("--index", f"{silo}={path}")]


def test_over_indexes(made: list[str], embedder: str, fedtailor: Command) -> None:
    done = fedtailor("ask", "how does an oak grow", *made, *settings(embedder))
    assert done.code == 0, done.err
    answer, *sources = done.out.split("\n\n")
    assert answer.strip()
    assert sources[0].startswith("[west/trees.md#Trees] ")
    assert "An oak grows slowly." in sources[0]
    assert done.err[-1].startswith("asked: north, south, west; retrieval ")


def test_a_policy_and_a_router(made: list[str], embedder: str, fedtailor: Command) -> None:
    policy = 'data.documents={share="snippets", words=2}'
    done = fedtailor("ask", "how does an oak grow", *made, *settings(embedder), "--set", policy, "--set", "method.route=1")
    assert done.code == 0, done.err
    assert "An oak …" in done.out
    assert "grows" not in done.out
    assert "asked: west; not asked: north, south" in done.err[-1]


def test_no_answer(made: list[str], embedder: str, fedtailor: Command) -> None:
    done = fedtailor("ask", "quantum zebra", *made, *settings(embedder), "--set", "method.floor=1.0")
    assert done.code == 0, done.err
    assert done.out.startswith("No answer found")


def test_over_a_finished_run(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, fedtailor: Command) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path, embedder)
    runs.begin(experiment.load(file, ['rows=["federated"]']), tmp_path / "run", "a test").conduct()
    done = fedtailor("ask", "how does an oak grow", "--run", tmp_path / "run")
    assert done.code == 0, done.err
    assert "[west/trees.md]" in done.out
    fails(fedtailor("chat", tmp_path / "run"), 2, "ask it with `fedtailor ask --run")
    merged = fedtailor("export", tmp_path / "run", tmp_path / "merged", "--merge")
    fails(merged, 2, "no change of the model's weights; export without --merge")
    there = fedtailor("ask", "how does an oak grow", "--experiment", file)
    assert there.out == done.out


def test_asked_wrongly(made: list[str], embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    fails(fedtailor("ask", *made), 2, "ask a question, in quotes, or --web")
    fails(fedtailor("ask", "x", "--web", *made), 2, "not both")
    fails(fedtailor("ask", "x"), 2, "say whose documents: --index NAME=FILE")
    fails(fedtailor("ask", "x", "--run", tmp_path, *made), 2, "say whose documents")
    fails(fedtailor("ask", "x", "--run", tmp_path), 2, "no finished run there")
    fails(fedtailor("ask", "x", "--index", "none.index"), 2, "none.index: no index there; make one with")
    fails(fedtailor("ask", "x", *made, *made[:2]), 2, "each name once")
    fails(fedtailor("ask", "x", *made, "--set", "method.pasages=3"), 2, "no setting 'pasages'; did you mean 'passages'?")
    fails(fedtailor("ask", "x", *made, "--set", "data.documents.share=all"), 2, "documents", "'full'")
    fails(fedtailor("ask", "x" * 3000, *made, *settings(embedder)), 1, "3000 letters; 2,000 at most")
    other = tmp_path / "other.toml"
    other.write_text('[data]\nsource="-"\ntemplate="{x}"\nanswer="x"\nsilo_column="x"\n[method]\nname="lora"\n')
    fails(fedtailor("ask", "x", "--experiment", other), 2, "its method is 'lora', which asks no silo for passages")
