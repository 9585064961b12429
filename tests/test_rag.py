"""Whole runs of rag over tiny documents: each row asks whom it should, figures are of who asks, a retriever is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Ended
from fedtailor import data, experiment, models, runs, wire
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment
from fedtailor.methods.rag import Rag, Served
from fedtailor.models import Resident
from fedtailor.retrieval import asking, embedding, writing
from fedtailor.retrieval.answerer import Asking
from libraries import LIBRARIES

Command = Callable[..., Ended]
QUESTIONS = {  # silo -> question, answer, document
    "north": [("where did the black cat sit", "on the mat", "cats.md"), ("which old dog ran home", "the old dog", "cats.md"),
              ("what swims", "a fish", "fish.txt")],
    "south": [("when did the bird sing", "at dawn", "birds.md"), ("is a cat here", "no cat here", "cats.md")],
    "west": [("how does an oak grow", "slowly", "trees.md"), ("how does a birch grow", "fast", "trees.md")],
}  # fmt: skip


def written(folder: Path, embedder: str, **settings: Any) -> Path:
    """An experiment, its questions (each of them in every split) and its passages."""
    rows = [
        {"silo": silo, "question": question, "answer": answer, "id": document, "split": split}
        for silo, some in QUESTIONS.items() for question, answer, document in some for split in ("train", "val", "test")
    ]
    passages = [
        {"silo": silo, "document": name, "section": "", "text": text}
        for silo, documents in LIBRARIES.items() for name, text in documents.items()
    ]
    for name, table in (("questions", rows), ("passages", passages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    method = {"name": "rag", "embedder": embedder, "max_new_tokens": 4, "floor": 0.0, "passages": 2, "words_share": 0.9}
    table = {
        "rows": ["zero_shot", "alone", "federated", "routed", "centralized"], "rounds": 2, "model": {"name": "tiny"},
        "data": {"source": str(folder / "questions.jsonl"), "template": "{question}", "answer": "answer", "silo_column": "silo",
                 "corpus": str(folder / "passages.jsonl")},
        "engine": {"threads": 1, "cohort": 1}, "evaluate": {"samples": 2}, "baseline": {"routed": {"route": 1}},
        "method": {**method, **settings},
    }  # fmt: skip
    import tomli_w

    file = folder / "rag.toml"
    file.write_text(tomli_w.dumps(table))
    return file


@pytest.fixture(scope="module")
def conducted(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rag")
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDTAILOR_CACHE", str(folder / "cache"))
    one = runs.begin(experiment.load(written(folder, embedder)), folder / "run", "a test")
    result = one.conduct()
    patch.undo()
    return folder / "run", result


def test_federated_is_centralized(conducted: tuple[Path, dict[str, Any]]) -> None:
    rows = conducted[1]["rows"]
    assert list(rows) == ["zero_shot", "alone", "federated", "routed", "centralized"]
    for name in ("recall_at_5", "mrr"):
        assert rows["federated"][name] == rows["centralized"][name]
    assert rows["federated"]["token_f1"] == rows["centralized"]["token_f1"], "the same passages, the same answers"
    assert rows["federated"]["recall_at_5"]["mean"] == 1, "of six passages five are seen, and words tell"
    assert set(rows["federated"]["mrr"]["per_silo"]) == {"north", "south", "west"}


def test_each_row_asks_whom_it_should(conducted: tuple[Path, dict[str, Any]]) -> None:
    rows = conducted[1]["rows"]
    assert rows["federated"]["silos_asked"]["mean"] == 3
    assert rows["routed"]["silos_asked"]["mean"] == 1
    assert rows["centralized"]["silos_asked"]["mean"] == 1
    assert "recall_at_5" not in rows["zero_shot"]
    assert set(rows["zero_shot"]["token_f1"]["per_silo"]) == {"north", "south", "west"}


def test_a_silo_alone_knows_its_own_questions(conducted: tuple[Path, dict[str, Any]]) -> None:
    alone = conducted[1]["rows"]["alone"]
    assert alone["own"]["recall_at_5"]["mean"] == 1
    assert alone["recall_at_5"]["mean"] == pytest.approx(1 / 3), "of three silos' questions, those of one"
    assert alone["recall_at_5"]["pooled"] == pytest.approx((3 / 7 + 2 / 7 + 2 / 7) / 3)


def test_bytes_and_samples_are_told(conducted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = conducted
    federated = result["rows"]["federated"]
    assert federated["bytes_up"] > 0
    assert federated["evaluation_bytes_up"] > 0
    assert federated["trained_parameters"] == 0
    assert [sample["silo"] for sample in federated["samples"]] == ["north", "south"]
    assert all(sample["generated"] for sample in federated["samples"])
    served = wire.read_file(folder / "adapter" / "served.safetensors")
    assert isinstance(served, Served)
    assert set(served.told) == {"north", "south", "west"}


def test_the_report_has_its_figures(conducted: tuple[Path, dict[str, Any]]) -> None:
    from fedtailor import report

    page = report.write(conducted[0]).read_text()
    assert all(label in page for label in ("recall@5", "MRR", "token F1", "silos asked"))


def test_killed_and_resumed_no_row_is_done_again(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    one = runs.begin(experiment.load(written(tmp_path, embedder), ['rows=["federated"]']), tmp_path / "run", "a test")
    one.conduct()
    row = tmp_path / "run" / "rows" / "federated" / "row.json"
    before = row.stat().st_mtime_ns
    runs.resume(tmp_path / "run").conduct()
    assert row.stat().st_mtime_ns == before


@pytest.mark.parametrize("trainer", [{"name": "lora", "rank": 2, "lr": 0.05}, {"name": "full", "lr": 0.003}])
def test_a_retriever_that_is_trained(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, trainer: Mapping[str, Any]
) -> None:
    """Silos embed anew by it, are searched by it, and it loads in sentence-transformers."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path, embedder, trainer={**trainer, "local_steps": 4, "batch_size": 3}, words_share=0.0)
    rows = ["untrained", "alone", "federated", "centralized"]
    asked = experiment.load(file, [f"rows={json.dumps(rows)}", "evaluate.best_by=mrr", "method.answered=1"])
    one = runs.begin(asked, tmp_path / "run", "a test")
    found = one.conduct()["rows"]
    assert list(found) == rows
    assert found["untrained"]["trained_parameters"] == 0
    assert found["federated"]["trained_parameters"] > 0
    assert found["federated"]["best_round"] in (0, 1, 2)
    log = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [set(entry["val"]) for entry in log] == [{"recall_at_5", "mrr", "silos_asked"}] * 3
    assert log[2]["train_loss"] < log[1]["train_loss"]
    last = wire.read_file(tmp_path / "run" / "adapter" / "served.safetensors")
    if last.tensors:
        again = embedding.load(str(tmp_path / "run" / "adapter" / "retriever"))
        made = last.method.searched_by(last.told, last.tensors)
        assert set(made) == {one.sha256 for one in last.told.values()}
        (mine,) = made.values()
        texts = ["the black cat", "an oak"]
        assert np.abs(again.passages(texts).astype(int) - mine.passages(texts)).max() <= 8


def test_silos_embed_anew_only_as_often_as_asked(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    trainer = {"name": "lora", "rank": 2, "local_steps": 1, "batch_size": 2}
    one = experiment.load(written(tmp_path, embedder, trainer=trainer, embed_every=2), ["rounds=3", "evaluate.best_by=mrr"])
    loaded = data.load(one.data, one.silo, 0)
    told = list[asking.Tell]()

    def record(silo: str, direction: str, packed: Any) -> None:
        body = wire.unpack(packed)
        if isinstance(body, asking.Tell) and silo == "north":
            told.append(body)

    engine = InProcess(loaded.silos, {"base": models.load(one.model)}, rounds=3, record=record)
    report = experiment.run(one, engine)
    assert [bool(body.tensors) for body in told] == [False, True, True], "before the first, after the second and the last"
    assert [bool(entry["val"]) for entry in report.log] == [False] * 4, "no questions here"
    assert report.last.fresh


def asking_of(tmp_path: Path, embedder: str, **more: Any) -> tuple[Asking, Experiment]:
    one = experiment.load(written(tmp_path, embedder, **more))
    base = models.load(one.model)
    engine = InProcess(data.load(one.data, one.silo, 0).silos, {"base": base})
    served = one.method.serve(one.method.begin(engine.reach(0)))
    return served.open({"base": base}, engine.reach(1)), one


def test_an_answer_grows_and_ends(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    model, _ = asking_of(tmp_path, embedder)
    pieces = list(model.ask("how does an oak grow"))
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].text == ""
    assert pieces[0].sources[0].cited == "[west/trees.md]"
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(pieces))
    assert pieces[-1].asked == ("north", "south", "west")
    assert set(pieces[-1].seconds) == {"retrieval", "writing"}


def test_nothing_found(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No passage is near enough, and none has the words: the model is not asked."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    model, _ = asking_of(tmp_path, embedder, floor=1.0)
    pieces = list(model.ask("quantum zebra"))
    assert [(piece.found, piece.text) for piece in pieces] == [(False, ""), (False, writing.NOTHING)]
    assert pieces[-1].sources == ()
    assert next(model.ask("black cat sat mat")).found, "not near, but it has the words"


@pytest.mark.parametrize("rerank", ["likelihood"])
def test_ranked_again(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, rerank: str) -> None:
    """The same passages, in the order of how likely the question is after each."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    model, _ = asking_of(tmp_path, embedder, rerank=rerank, passages=2, reranked=4)
    question = "how does an oak grow"
    (sources,) = model.retrieved([question])[1]
    every = model.finder.sources(model.finder.find([question]), 4)[0]
    scores = dict(zip(every, writing.likelihood(model.resident, question, every), strict=True))
    assert sources == sorted(every, key=lambda one: -scores[one])[:2]


def test_ranked_again_by_a_cross_encoder(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, bert: Resident
) -> None:
    """One of random weights, as a folder that sentence-transformers loads."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoConfig, AutoModelForSequenceClassification

    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cross"
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(embedder, num_labels=1)).save_pretrained(folder)
    bert.save_reader(folder)
    model, _ = asking_of(tmp_path, embedder, rerank=str(folder), passages=2, reranked=4)
    question = "how does an oak grow"
    (sources,) = model.retrieved([question])[1]
    every = model.finder.sources(model.finder.find([question]), 4)[0]
    scores = CrossEncoder(str(folder)).predict([(question, one.text) for one in every])
    assert sources == [one for _, one in sorted(zip(scores, every, strict=True), key=lambda pair: -pair[0])][:2]
    other, _ = asking_of(tmp_path, embedder, rerank="nobody/nothing")
    with pytest.raises(UserError, match="neither 'likelihood' nor a cross-encoder"):
        other.retrieved([question])


def test_the_best_passage_is_quoted(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    model, _ = asking_of(tmp_path, embedder, write="quote")
    found = [*model.ask("how does an oak grow")][-1]
    assert found.text.endswith("An oak grows slowly. A birch grows fast. [west/trees.md]")
    assert found.done


def test_another_runs_model_answers(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix that was learnt on the same base, and passages: together."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    from tiny_runs import conduct

    conduct(tmp_path / "other", "method.name=prefix", 'rows=["federated"]', "rounds=1")
    model, _ = asking_of(tmp_path, embedder, answers=str(tmp_path / "other"))
    assert model.model is not None
    assert model.model.tensors
    assert [*model.ask("how does an oak grow")][-1].done


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["method.answers=nowhere"], "method. answers = 'nowhere': no finished run there"),
        (["data.corpus="], "silo 'north' has no documents: set .data. corpus"),
        (["method.passages=30"], "candidates = 20 is fewer than the passages"),
        (['method.trainer={name="lroa"}'], "trainer: 'lroa' is no method that trains; did you mean 'lora'"),
        (['rows=["untrained"]'], "rows: 'untrained' needs method.name = 'rag' with a trainer"),
        (["baseline={}"], "rows: 'routed' needs method.name = 'rag', and .baseline.routed. route"),
        (['method.trainer={name="lora"}', "evaluate.best_by=loss"], "best_by = 'loss': not measured on this task"),
        (["method.embedder=nobody/nothing"], "embedder 'nobody/nothing': cannot be loaded"),
    ],
)
def test_what_is_told_before_any_silo_is_asked(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, sets: list[str], why: str
) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=why):
        runs.begin(experiment.load(written(tmp_path, embedder), sets), tmp_path / "run", "a test")


def test_check_lists_what_leaves(tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch, fedtailor: Command) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    done = fedtailor("check", written(tmp_path, embedder))
    assert done.code == 0, done.err
    assert "at" in done.out
    assert "cosine" in done.out
    assert "float64" in done.out


def test_settings_cross_the_wire() -> None:
    method = Rag(trainer={"name": "lora", "rank": 2}, route=2)
    assert wire.unpack(wire.pack(method)) == method
    assert method.pooled(3).trains.local_steps == 3 * method.trains.local_steps
    assert method.pooled(3).route == 0
