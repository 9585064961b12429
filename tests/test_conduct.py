"""Cells are run once each, whoever runs them, and however often they are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from background import wait_for
from fedtailor import models
from fedtailor.errors import UserError
from fedtailor.files import read_json
from fedtailor.study import conduct, grid, measured
from tiny_runs import TINY
from tiny_studies import CLOSE, LOST, a_study

FIGURES = ("accuracy", "loss", "macro_f1", "bytes_up", "bytes_down", "best_round", "rejected", "trained_parameters")


def figures(study: grid.Study, root: Path) -> list[Any]:
    """All that time does not change."""
    return [
        (one.cell.label, one.row, {name: one.figures[name] for name in FIGURES if name in one.figures})
        for one in measured.read(study, root)
    ]


def test_each_distinct_run_is_made_once_and_found_by_every_part(tmp_path: Path) -> None:
    study, seen = a_study(CLOSE, LOST, seeds=(0,)), []
    loads = models.loads()
    told = conduct.conduct(study, tmp_path, each=lambda cell: seen.append(cell.label))
    assert (told.done, told.failed) == (3, {})
    assert seen == ["close (method prefix), seed 0", "close (method lora), seed 0", "lost (method prefix, dropout 0.2), seed 0"]
    assert models.loads() - loads <= 1, "one base for all"
    found = measured.read(study, tmp_path)
    assert [(one.part, one.row) for one in found] == [
        ("close", "federated"), ("close", "centralized"), ("close", "federated"), ("close", "centralized"),
        ("lost", "federated"), ("lost", "federated"),
    ]  # fmt: skip
    assert found[4].figures == found[0].figures, "both parts ask it"
    assert found[0].rounds[-1]["round"] == 2
    assert found[0].environment["model"] == "tiny"
    assert found[0].flops["steps"] == 2 * 3 * 2
    assert found[1].flops == {}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("row.json")}
    assert conduct.conduct(study, tmp_path, each=lambda cell: seen.append("again")).done == 3
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("row.json")}
    assert "again" not in seen


def test_a_cell_is_the_run_that_fedtailor_run_makes(tmp_path: Path) -> None:
    from tiny_runs import asked
    from tiny_runs import conduct as run

    study = a_study(CLOSE, seeds=(1,))
    conduct.conduct(study, tmp_path / "study")
    alone = run(tmp_path / "run", "seeds=[1]", 'rows=["federated","centralized"]')
    assert asked().method == study.cells[0].experiment.method
    for one in measured.read(study, tmp_path / "study")[:2]:
        assert one.figures["loss"] == alone["rows"][one.row]["loss"]
        assert one.figures["bytes_up"] == alone["rows"][one.row]["bytes_up"]


def test_a_part_more_and_a_row_more_run_what_is_missing_alone(tmp_path: Path) -> None:
    conduct.conduct(a_study(LOST, seeds=(0,)), tmp_path)
    file = next((tmp_path / "cells").rglob("federated/row.json"))
    before = file.stat().st_mtime_ns
    seen: list[str] = []
    more = a_study(LOST, CLOSE, seeds=(0,))
    conduct.conduct(more, tmp_path, each=lambda cell: seen.append(cell.label))
    assert seen == ["lost (method prefix, dropout 0), seed 0", "close (method lora), seed 0"]
    assert file.stat().st_mtime_ns == before
    assert len(measured.read(more, tmp_path)) == 6


def test_rows_without_training_are_scored_once_for_all_methods(tmp_path: Path) -> None:
    study = a_study({"name": "p", "axes": {"method": ["prefix", "lora"]}, "rows": ["zero_shot", "few_shot"]})
    conduct.conduct(study, tmp_path)
    rows = [read_json(path) for path in sorted((tmp_path / "cells").rglob("row.json"))]
    spent = [row["evaluation_seconds"] for row in rows]
    assert len(rows) == 2 * 2 * 2
    assert len(set(spent)) == 3, "zero-shot once, three examples once a seed"


def test_figures_are_kept_and_models_are_not_unless_asked(tmp_path: Path) -> None:
    conduct.conduct(a_study(LOST, seeds=(0,)), tmp_path / "light")
    names = {path.name for path in (tmp_path / "light").rglob("*") if path.is_file()}
    assert names == {"study.toml", "experiment.toml", "plan.json", "row.json", "rounds.jsonl", "result.json",
                     ".taken", ".lock"}  # fmt: skip
    conduct.conduct(a_study(LOST, seeds=(0,), keep="models"), tmp_path / "whole")
    assert len(list((tmp_path / "whole").rglob("adapter/adapter_config.json"))) == 2


def test_a_failed_cell_is_told_and_tried_again(tmp_path: Path) -> None:
    study = a_study({"name": "lost", "axes": {"dropout": [1.0, 0.0]}}, seeds=(0,))
    told = conduct.conduct(study, tmp_path)
    assert told.done == 1
    assert list(told.failed) == ["lost (dropout 1), seed 0"]
    assert "no reply of 3 silos could be used" in told.failed["lost (dropout 1), seed 0"]
    assert conduct.failures(study, tmp_path) == told.failed
    assert [one.at for one in measured.read(study, tmp_path)] == [{"dropout": 0.0}]
    assert conduct.conduct(study, tmp_path).failed == told.failed, "the same again: it was tried"


def bad(replies: object) -> object:
    raise ZeroDivisionError("oops")


def test_a_bug_in_one_cell_is_that_cells_alone(tmp_path: Path) -> None:
    study = a_study({"name": "p", "axes": {"aggregate": ["test_conduct:bad", "median"]}}, seeds=(0,))
    told = conduct.conduct(study, tmp_path)
    assert told.done == 1
    assert told.failed == {"p (aggregate test_conduct:bad), seed 0": "unexpected ZeroDivisionError: oops"}


def test_other_rows_are_other_cells(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(TINY.with_suffix(".jsonl").read_text())
    part = {"name": "p", "set": {"data.source": str(file)}}
    conduct.conduct(a_study(part, seeds=(0,)), tmp_path / "study")
    assert len(measured.read(a_study(part, seeds=(0,)), tmp_path / "study")) == 1
    file.write_text(file.read_text().replace("lovely", "loathed"))
    assert measured.read(a_study(part, seeds=(0,)), tmp_path / "study") == [], "figures of other rows are not these"
    assert conduct.conduct(a_study(part, seeds=(0,)), tmp_path / "study").done == 1


def test_a_tracker_keeps_what_it_wrote(tmp_path: Path) -> None:
    kept = tmp_path / "cells" / "x" / "rows" / "federated" / "tensorboard" / "events"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    (kept.parents[1] / "state").mkdir()
    (kept.parents[1] / "served.safetensors").write_text("")
    conduct._lighten(tmp_path / "cells" / "x")
    assert [path.name for path in kept.parents[1].iterdir()] == ["tensorboard"]
    assert kept.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a study; choose another folder with --out"):
        conduct.begin(a_study(LOST), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        conduct.begin(a_study(LOST), tmp_path / "file")


WORK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fedtailor.study import conduct
from tiny_runs import TINY
from tiny_studies import CLOSE, LOST, a_study
conduct.conduct(a_study(CLOSE, LOST), Path({root!r}))
"""


def started(root: Path) -> subprocess.Popen[bytes]:
    text = WORK.format(tests=str(Path(__file__).parent), root=str(root))
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_twice_and_resumed_it_has_the_same_figures(tmp_path: Path) -> None:
    study = a_study(CLOSE, LOST)
    conduct.conduct(study, tmp_path / "once")
    for rows in (2, 6):  # killed in the middle of whatever it does then
        process = started(tmp_path / "killed")
        assert wait_for(lambda rows=rows: len(list((tmp_path / "killed").rglob("row.json"))) >= rows, 60, 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(measured.read(study, tmp_path / "killed")) < len(measured.read(study, tmp_path / "once"))
    conduct.conduct(study, tmp_path / "killed")
    assert figures(study, tmp_path / "killed") == figures(study, tmp_path / "once")


@pytest.mark.slow
def test_processes_share_the_work_and_none_is_done_twice(tmp_path: Path) -> None:
    study = a_study(CLOSE, LOST)
    processes = [started(tmp_path / "shared") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    conduct.conduct(study, tmp_path / "once")
    assert figures(study, tmp_path / "shared") == figures(study, tmp_path / "once")
