"""Rounds as they happen to a tracker: what is told, what never is, and what a failing one may do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from commands import Command, fails
from fedtailor import progress, runs, tracking
from fedtailor.errors import UserError
from fedtailor.tracking import Tracked
from tiny_runs import FEDERATED, TINY, conduct

Round = tuple[int, Mapping[str, float]]


@dataclass
class Notebook:
    """A tracker of a user's: Notebook(tracked) begins a run. Stops at a round of its choice, or is cut off there."""

    tracked: Tracked
    rounds: list[Round] = field(default_factory=list)
    ended: list[Mapping[str, float] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        KEPT.append(self)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        self.rounds.append((number, figures))
        AFTER.get(number, lambda: None)()

    def end(self, figures: Mapping[str, float] | None) -> None:
        self.ended.append(figures)


KEPT: list[Notebook] = []
AFTER: dict[int, Callable[[], Any]] = {}
MINE = f"{__name__}:Notebook"


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    KEPT.clear()
    AFTER.clear()
    yield
    tracking.to(None)
    progress.show(progress.Silent())


def failing() -> None:
    raise OSError(28, "No space left on device")


def cut_off() -> None:
    raise KeyboardInterrupt


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from (str(key), *texts(one))
    elif isinstance(value, str):
        yield value


def test_each_trained_row_is_a_run_of_its_rounds_and_final_figures(tmp_path: Path) -> None:
    tracking.to(MINE)
    result = conduct(tmp_path / "mine", 'rows=["zero_shot", "federated", "alone"]', "method.lr=0.03")
    rows = ["federated", "alone/cafe", "alone/clinic", "alone/shop"]
    assert [one.tracked.name for one in KEPT] == [f"mine/{row}/seed-0" for row in rows]
    assert {one.tracked.group for one in KEPT} == {"tiny"}
    assert len({one.tracked.id for one in KEPT}) == 4
    federated = KEPT[0]
    assert federated.tracked.config["method.lr"] == 0.03
    assert (federated.tracked.config["row"], federated.tracked.config["seed"]) == ("federated", 0)
    for (number, figures), entry in zip(federated.rounds, log_of(tmp_path / "mine" / "rows" / "federated"), strict=True):
        assert number == entry["round"]
        for same in {"train_loss", "bytes_up", "bytes_down", "seconds", "evaluation_seconds"} & set(entry):
            assert figures[same] == entry[same]
        for metric in ("accuracy", "loss", "macro_f1"):
            assert figures[f"val/{metric}"] == entry["val"][metric]["mean"]
        assert figures["rejected"] == 0
        assert figures.get("silos") == (3 if number else None)
    row = result["rows"]["federated"]
    (end,) = federated.ended
    assert end is not None
    for metric in ("accuracy", "loss", "macro_f1"):
        assert (end[f"test/{metric}"], end[f"test/worst/{metric}"]) == (row[metric]["mean"], row[metric]["worst"])
    assert (end["cost/bytes_up"], end["cost/seconds"]) == (row["bytes_up"], row["seconds"])


def test_figures_by_hand() -> None:
    entry = {
        "round": 3, "train_loss": 0.5, "bytes_up": 7, "note": "a text", "flag": True, "silos": ["north", "south"],
        "rejected": {"east": "late"}, "val": {"loss": {"mean": 2.0, "per_silo": {"north": 1.0}}}, "prompt": {"text": "x"},
    }  # fmt: skip
    assert tracking.of_round(entry) == {"train_loss": 0.5, "bytes_up": 7, "val/loss": 2.0, "silos": 2, "rejected": 1}
    part = {"mean": 0.5, "worst": 0.25, "per_silo": {"north": 0.25}}
    row = {"accuracy": part, "own": {"accuracy": part}, "seconds": 2.0, "best_round": 3, "prompt": "x", "samples": [{"a": "b"}]}
    means = {f"test/{name}": value for name, value in (("accuracy", 0.5), ("worst/accuracy", 0.25))}
    own = {f"test/own/{name}": value for name, value in (("accuracy", 0.5), ("worst/accuracy", 0.25))}
    assert tracking.of_row(row) == {**means, **own, "cost/seconds": 2.0}


def test_no_row_no_text_and_no_place_is_told(tmp_path: Path) -> None:
    """The very texts of the data, the silos' reasons, the prompts of a search, and the folders that things lie in."""
    tracking.to(MINE)
    rows = TINY.with_name("tiny.jsonl")
    (tmp_path / "held.jsonl").write_bytes(rows.read_bytes())
    prompts = 'method.prompts=["{input} A secret wording:"]'
    conduct(tmp_path / "run", FEDERATED, "method.name=search", prompts, f"data.source={tmp_path / 'held.jsonl'}")
    one = KEPT[0]
    assert one.tracked.config["data.source"] == "held.jsonl"
    said = "\n".join(texts(one.tracked.config)) + one.tracked.name + one.tracked.group
    assert "secret wording" not in said
    assert str(tmp_path) not in said
    assert not any(json.loads(line)["text"] in said for line in rows.read_text().splitlines())
    assert all(isinstance(v, int | float) for _, figures in one.rounds for v in figures.values())


def test_a_resumed_row_goes_on_with_the_round_after(tmp_path: Path) -> None:
    tracking.to(MINE)
    AFTER[1] = cut_off
    with pytest.raises(KeyboardInterrupt):
        conduct(tmp_path, FEDERATED, "rounds=3")
    AFTER.clear()
    runs.resume(tmp_path).conduct()
    before, after = KEPT
    assert [number for number, _ in before.rounds + after.rounds] == [0, 1, 2, 3]
    assert (before.tracked.id, before.tracked.name) == (after.tracked.id, after.tracked.name)
    assert before.ended == [None]
    assert len(after.ended) == 1
    assert after.ended[0] is not None
    runs.resume(tmp_path).conduct()
    assert len(KEPT) == 2, "what is finished is not told again"


def test_a_tracker_named_at_resume_is_told_the_rounds_before(tmp_path: Path) -> None:
    tracking.to(MINE)
    AFTER[1] = cut_off
    with pytest.raises(KeyboardInterrupt):
        conduct(tmp_path, FEDERATED, "rounds=3")
    file = tmp_path / "rows" / "federated" / tracking.FILE
    file.write_text(file.read_text().replace(MINE, "another"))
    AFTER.clear()
    runs.resume(tmp_path).conduct()
    assert [number for number, _ in KEPT[1].rounds] == [0, 1, 2, 3]
    assert KEPT[0].tracked.id != KEPT[1].tracked.id


@pytest.mark.parametrize("place", ["begin", "log", "end"])
def test_a_tracker_that_fails_ends_no_run_and_is_left(
    place: str, tmp_path: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    progress.show(progress.Lines(said.append))
    where = {"begin": "__post_init__", "log": "log", "end": "end"}[place]
    monkeypatch.setattr(Notebook, where, lambda *_: failing())
    tracking.to(MINE)
    row = conduct(tmp_path, 'rows=["federated", "centralized"]')["rows"]["federated"]
    assert row["loss"] == whole[1]["rows"]["federated"]["loss"]
    stops = [line for line in said if "tracking" in line]
    assert stops == [f"tracking stops here, the run goes on: {MINE}: OSError: [Errno 28] No space left on device"]
    assert len(KEPT) <= 1, "the next row is not tried"


def test_nothing_is_told_without_being_asked(tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED)
    assert KEPT == []
    assert not (tmp_path / "rows" / "federated" / tracking.FILE).exists()


def test_every_seed_is_a_run_of_its_own(tmp_path: Path) -> None:
    tracking.to(MINE)
    conduct(tmp_path / "two", FEDERATED, "seeds=[3, 4]")
    assert [one.tracked.name for one in KEPT] == ["two/federated/seed-3", "two/federated/seed-4"]


@pytest.mark.parametrize("name", ["trackio", "mlflow", "tensorboard", "wandb"])
def test_a_missing_library_is_told_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError) as told:
        tracking.to(name)
    assert str(told.value) == f"--track {name} needs fedtailor[{name}]: pip install 'fedtailor[{name}]'"


def test_a_folder_that_a_tracker_left_is_not_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"needs fedtailor\[wandb\]"):
        tracking.to("wandb")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mlfow", "--track = 'mlfow': no such tracker; did you mean 'mlflow'? (choices: mlflow, tensorboard, trackio, wandb); "
                  "or give 'package.module:tracker'"),
        ("nowhere.at.all:Class", "--track = 'nowhere.at.all:Class': cannot be imported: ModuleNotFoundError: "),
        (f"{__name__}:TINY", f"--track = '{__name__}:TINY': is no tracker"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_told_before_anything_runs(
    name: str, told: str, fedtailor: Command, tmp_path: Path
) -> None:
    fails(fedtailor("run", TINY, "--out", tmp_path / "run", "--track", name), 2, told)
    assert not (tmp_path / "run").exists()
