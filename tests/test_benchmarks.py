"""Benchmarks run: each here with so little that it takes a second. They check by themselves what they compare."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def retrieval(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets for good
    spec = importlib.util.spec_from_file_location("benchmarks_retrieval", BENCHMARKS / "retrieval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_retrieval", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("least", [10, 1000])
def test_retrieval(
    retrieval: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], least: int
) -> None:
    """Two silos of 60 passages: with graphs, of which every passage is looked at, and without."""
    from fedtailor.retrieval import nearest

    monkeypatch.setattr(nearest, "LEAST", least)
    monkeypatch.setattr(retrieval, "QUESTIONS", 5)
    retrieval.silos(120, 2)
    told = capsys.readouterr().out
    assert "2 silos of 60 passages, 120 pooled; 5 questions" in told
    assert "exact: of all 5 questions the silos' passages, scores and order are those of one index" in told
    assert ("silos: graphs in" in told) == (least < 60)
    same = "silos: of the exact first 5 approximate has 1.0000, of all candidates 1.0000; MRR of the exact first 1.0000"
    assert (same in told) == (least < 60)


def test_beside(retrieval: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An exact search finds what the products say: numbers of passages are those of rows."""
    monkeypatch.setattr(retrieval, "QUESTIONS", 5)
    retrieval.beside(100)
    ours, *others = capsys.readouterr().out.splitlines()
    assert ours.startswith("fedtailor: made in")
    assert ours.endswith("recall 1.000")
    assert [line.partition(":")[0] for line in others] == ["LanceDB", "FAISS HNSW"]
