"""Each tracker for real, where its library is installed: a run that is cut off and goes on, read back by the library itself.

In a process of its own, as libraries read their variables once, when they are imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import PROCESS, SLIM, TINY

CUT = """
import sys
from fedtailor import trackers, tracking
from fedtailor.cli import main
real = getattr(trackers, sys.argv[1])
def cut(run):
    one = real(run)
    def log(number, figures):
        one.log(number, figures)
        if number == 1:
            raise KeyboardInterrupt
    return trackers.Calls(log, one.end)
tracking._by = None
tracking.to = lambda name: setattr(tracking, "_by", name and (name, cut))
sys.argv[1:] = sys.argv[2:]
main()
"""
# Each prints [[step, value], ...] of val/loss, and the last test/loss.
READ = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
one = EventAccumulator("run/rows/federated/tensorboard").Reload()
steps = [[e.step, e.value] for e in one.Scalars("val/loss")]
print(json.dumps([steps, one.Scalars("test/loss")[-1].value]))
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient()
(one,) = client.search_runs([client.get_experiment_by_name("fedtailor").experiment_id])
assert (one.info.status, one.info.run_name) == ("FINISHED", "run/federated/seed-0")
assert one.data.params["method.name"] == "prefix" and not any("user" in tag or "source" in tag for tag in one.data.tags)
steps = [[m.step, m.value] for m in client.get_metric_history(one.info.run_id, "val/loss")]
print(json.dumps([steps, one.data.metrics["test/loss"]]))
""",
    "trackio": """
import trackio
(one,) = trackio.Api().runs("fedtailor")
def values(metric):
    from contextlib import redirect_stdout
    from io import StringIO
    from trackio.cli import main
    import sys
    sys.argv[1:] = ["get", "metric", "--project", "fedtailor", "--run", one.name, "--metric", metric, "--json"]
    with redirect_stdout(StringIO()) as told:
        main()
    return [[m["step"], m["value"]] for m in json.loads(told.getvalue())["values"]]
print(json.dumps([values("val/loss"), values("test/loss")[-1][1]]))
""",
}


def process(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    place = {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    place |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    environment = {**os.environ, **SLIM, "HF_HUB_OFFLINE": "1", **place, **variables}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def tracked_twice(folder: Path, name: str) -> list[dict[str, Any]]:
    """A run cut off after its first round, and gone on; its log."""
    python = sys.executable
    run = ("run", str(TINY), "--set", "rounds=3", "--set", 'rows=["federated"]', "--out", "run", "--track", name)
    first = process(folder, python, "-c", CUT, name, *run)
    assert first.returncode == 130, first.stderr
    assert f"--resume run --track {name}" in first.stderr
    second = process(folder, *PROCESS, "run", "--resume", "run", "--track", name)
    assert second.returncode == 0, second.stderr
    assert "tracking stops" not in first.stderr + second.stderr
    return [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", READ)
def test_a_tracker_holds_each_round_once_and_the_end(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    log = tracked_twice(tmp_path, name)
    read = process(tmp_path, sys.executable, "-c", f"import json\n{READ[name]}")
    assert read.returncode == 0, read.stderr
    steps, last = json.loads(read.stdout.splitlines()[-1])
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert [value for _, value in steps] == pytest.approx([entry["val"]["loss"]["mean"] for entry in log])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert last == pytest.approx(result["rows"]["federated"]["loss"]["mean"])


def test_wandb_offline_keeps_both_parts_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracked_twice(tmp_path, "wandb")
    id = json.loads((tmp_path / "run" / "rows" / "federated" / "tracked.json").read_text())["wandb"]["id"]
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{id}.wandb"))
    assert len(parts) == 2, "for `wandb sync`, which makes them one"
    assert not [*(tmp_path / "wandb").glob("offline-run-*/files/*")], "no metadata, no console, no requirements"
