"""`fedtailor study`, as it is typed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from background import wait_for
from commands import PROCESS, SLIM, Command, fails
from commands import fedtailor as fedtailor
from tiny_runs import TINY

STUDY = f"""
seeds = [0]
base = "{TINY}"
[[part]]
name = "close"
asks = "performance"
axes = {{ method = ["prefix", "lora"] }}
rows = ["federated", "centralized"]
set = {{ "engine.threads" = 1 }}
"""
MOODS = ("bad", "good", "good")
MINE = "".join(
    json.dumps({"site": f"s{i % 2}", "text": f"The visit of day {i} was {MOODS[i % 3]}.", "mood": MOODS[i % 3]}) + "\n"
    for i in range(60)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    return path


def test_a_study_is_run_reported_and_not_run_again(fedtailor: Command, file: Path, tmp_path: Path) -> None:
    ended = fedtailor("study", file)
    assert ended.code == 0, ended
    assert "runs/small: 2 runs, 0 finished" in ended.err[0]
    assert "report: runs/small/report.html" in ended.out
    assert "federated" in ended.out, "findings in words"
    root = tmp_path / "runs" / "small"
    assert "<h1" in (root / "report.html").read_text()
    assert list((root / "tables").glob("close-*.csv"))
    assert list((root / "tables").glob("close-*.tex"))
    assert list((root / "plots").glob("close-*.svg"))
    rows = {path: path.stat().st_mtime_ns for path in root.rglob("row.json")}
    again = fedtailor("study", file)
    assert "2 runs, 2 finished" in again.err[0]
    assert rows == {path: path.stat().st_mtime_ns for path in root.rglob("row.json")}
    assert fedtailor("study", file, "--report").out == again.out


def test_check_tells_runs_time_and_bytes(fedtailor: Command, file: Path) -> None:
    ended = fedtailor("check", file)
    assert ended.code == 0, ended
    assert "close" in ended.out
    assert "2 runs to do, about" in ended.out
    assert "kB" in ended.out


def test_rows_of_mine_and_no_file(fedtailor: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(MINE)
    few = ["--seeds", 1, "--set", "base.rounds=1", "--set", "base.method.local_steps=1", "--set", "base.engine.cohort=1"]
    ended = fedtailor("study", "--data", "mine.jsonl", "--silo-column", "site", "--model", "tiny", *few)
    assert ended.code == 0, ended
    assert ended.err[0] == "60 rows of 2 silos (site); text: text; label: mood (bad, good)"
    assert "report: runs/study_mine/report.html" in ended.out
    made = tmp_path / "runs" / "study_mine" / "study.toml"
    again = fedtailor("study", made, "--report")
    assert again.code == 0, "what was made can be changed, and run as a file"
    made.write_text("margin = 0.05  # mine\n" + made.read_text())
    before = made.read_text()
    told = fedtailor("study", "--data", "mine.jsonl", "--silo-column", "site", "--model", "tiny", *few)
    fails(told, 2, "says something else: it was changed", "run it with `fedtailor study", "--out")
    assert fedtailor("study", made, "--report").code == 0
    assert made.read_text() == before, "with its comments"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a study's file, or --data"),
        (["nowhere.toml"], "no such file"),
        (["--data", "nowhere.jsonl"], "say which column tells whose a row is: --silo-column"),
        (["--data", "nowhere.jsonl", "--silo-column", "site"], "nowhere.jsonl"),
        ([TINY], "no [[part]], so it is no study"),
        (["small.toml", "--report"], "no study there yet; run it without --report"),
        (["small.toml", "--set", "base=5"], "no [base]"),
        (["small.toml", "--track", "mlfow"], "did you mean 'mlflow'"),
        (["small.toml", "--out", "small.toml"], "a file, not a folder"),
        (["small.toml", "--model", "tiny", "--seeds", "9"], "--model, --seeds: goes with --data"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(fedtailor: Command, file: Path, arguments: list[str], told: str) -> None:
    fails(fedtailor("study", *arguments), 2, told)


def test_a_failed_run_is_named_and_the_rest_is_reported(fedtailor: Command, file: Path) -> None:
    file.write_text(STUDY + '[[part]]\nname = "lost"\naxes = { dropout = [0.0, 1.0] }\n')
    ended = fedtailor("study", file)
    fails(ended, 1, "1 runs failed, first lost (dropout 1), seed 0: round 1: no reply of 3 silos", "once mended, the")
    assert "report: runs/small/report.html" in ended.out


@pytest.mark.slow
def test_processes_share_it_in_the_background_and_ctrl_c_loses_nothing(file: Path, tmp_path: Path) -> None:
    def typed(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PROCESS, "study", str(file), *words], cwd=tmp_path, env=SLIM, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def rows() -> int:
        return len(list(tmp_path.rglob("row.json")))

    first = typed()
    assert wait_for(rows, 60, 0.05)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=60)[1]
    assert first.returncode == 130
    assert f"stopped; go on with: fedtailor study {file}" in told
    assert rows() < 4
    out, _ = typed("--jobs", "2", "--background").communicate(timeout=60)
    assert out.startswith("running as process ")
    assert wait_for((tmp_path / "runs/small/report.html").exists, 120), (tmp_path / "runs/small/study.log").read_text()
    assert rows() == 4, (tmp_path / "runs/small/study.log").read_text()
    assert (tmp_path / "runs/small/worker-2.log").exists()
