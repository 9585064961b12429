"""The command line: what it prints and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import FEDERATED, PROCESS, SLIM, TINY, Command, Whole, contents, fails
from fedtailor import __version__


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`fedtailor run experiments/tiny.toml` as a process of its own, in an empty folder. Left as it is by every test."""
    here = tmp_path_factory.mktemp("cli")
    ended = subprocess.run(
        [*PROCESS, "run", str(TINY)], cwd=here, env=SLIM, capture_output=True, text=True, check=False
    )
    return Whole(here / "runs" / "tiny", ended)


def test_a_run_prints_the_table_and_leaves_everything(whole: Whole) -> None:
    folder, ended = whole
    assert ended.returncode == 0, ended.stderr
    for row in ("zero-shot", "few-shot", "alone", "federated", "centralized"):
        assert re.search(rf"^ *{row} +0\.\d{{3}}", ended.stdout, flags=re.M), ended.stdout
    assert "report: runs/tiny/report.html" in ended.stdout
    assert "\x1b" not in ended.stdout + ended.stderr, "no colours into a pipe"
    assert ended.stderr.splitlines()[0] == "run folder: runs/tiny"
    assert any(re.match(r"round 2 of 2, train loss \d", line) for line in ended.stderr.splitlines())
    assert (folder / "report.html").read_text().startswith("<!")
    result = json.loads((folder / "result.json").read_text())
    assert list(result["rows"]) == ["zero_shot", "few_shot", "alone", "federated", "centralized"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "rounds.jsonl").is_file()
    assert (folder / "experiment.toml").is_file()
    assert "Traceback" not in ended.stderr


def test_the_numbers_printed_are_those_of_the_result(whole: Whole) -> None:
    rows = json.loads((whole.folder / "result.json").read_text())["rows"]
    line = next(line for line in whole.ended.stdout.splitlines() if line.strip().startswith("federated"))
    assert [float(word) for word in line.split()[1:3]] == [
        round(rows["federated"]["accuracy"][which], 3) for which in ("mean", "worst")
    ]


def test_a_second_run_gets_a_folder_of_its_own(fedtailor: Command) -> None:
    assert fedtailor("run", TINY, *FEDERATED).code == 0
    before = contents(Path("runs/tiny"))
    again = fedtailor("run", TINY, *FEDERATED, "--seed", 4)
    assert again.code == 0
    assert again.err[0] == "run folder: runs/tiny-2"
    assert contents(Path("runs/tiny")) == before
    assert json.loads(Path("runs/tiny-2/result.json").read_text())["seeds"] == [4]


def test_a_run_goes_where_it_is_told_unless_something_is_there(fedtailor: Command, tmp_path: Path) -> None:
    assert fedtailor("run", TINY, *FEDERATED, "--out", "deep/er").code == 0
    assert (tmp_path / "deep" / "er" / "result.json").is_file()
    assert not (tmp_path / "runs").exists()
    before = contents(tmp_path)
    fails(fedtailor("run", TINY, "--out", "deep/er"), 2, "--out deep/er: not empty", "fedtailor run --resume deep/er")
    assert contents(tmp_path) == before


def test_resume_of_a_finished_run_does_nothing_again_and_prints_the_table(fedtailor: Command, whole: Whole) -> None:
    rows = {file: file.stat().st_mtime_ns for file in whole.folder.rglob("row.json")}
    result = (whole.folder / "result.json").read_bytes()
    again = fedtailor("run", "--resume", whole.folder)
    assert again.code == 0
    assert again.out.splitlines()[:8] == whole.ended.stdout.splitlines()[:8]
    assert not any(line.startswith("round") for line in again.err)
    assert {file: file.stat().st_mtime_ns for file in rows} == rows
    assert (whole.folder / "result.json").read_bytes() == result


def test_resume_of_another_experiment_is_refused(fedtailor: Command, whole: Whole) -> None:
    before = contents(whole.folder)
    ended = fedtailor("run", TINY, "--set", "rounds=3", "--resume", whole.folder)
    fails(ended, 2, f"--resume {whole.folder}: holds another experiment (differs in rounds); leave FILE out")
    assert contents(whole.folder) == before
    fails(fedtailor("run", "--resume", "nowhere"), 2, "--resume nowhere: no run there", "fedtailor run FILE")


def test_resume_of_a_damaged_experiment_file_is_told(fedtailor: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text('name = "cut')
    fails(fedtailor("run", "--resume", tmp_path), 2, "experiment.toml")


def test_check_lists_what_would_leave_and_trains_nothing(fedtailor: Command, tmp_path: Path, whole: Whole) -> None:
    ended = fedtailor("check", TINY)
    assert ended.code == 0
    assert list(tmp_path.iterdir()) == []
    assert re.search(r"delta/prompt_encoder\.default\.embedding\.weight │ 4 x 64 │ float32", ended.out)
    assert re.search(r"^│ clinic +│ +\d+ +│ +\d+ +│ +\d+ +│ +0 +│$", ended.out, flags=re.M)
    count, each = re.search(r"([\d,]+) numbers, about ([\d,]+) bytes up per silo and round", ended.out).groups()  # type: ignore[union-attr]
    assert count == "256"
    first = json.loads((whole.folder / "rounds.jsonl").read_text().splitlines()[1])
    # a loss has up to sixteen digits more than the zero that stands for it
    assert abs(first["bytes_up"] / 3 - int(each.replace(",", ""))) <= 32


def test_the_lists(fedtailor: Command) -> None:
    methods = fedtailor("methods").out
    assert re.search(r"prefix .*virtual_tokens = 16", methods.replace("\n", " "))
    assert "rank = 8" in methods
    assert "local_steps = 8" in methods
    assert all(name in fedtailor("models", "list").out for name in ("smollm2-135m", "minilm", "tiny"))
    assert "sentiment" in fedtailor("data", "list").out


def test_the_version_and_the_help(fedtailor: Command) -> None:
    assert (fedtailor("--version").code, fedtailor("--version").out.strip()) == (0, f"fedtailor {__version__}")
    shown = fedtailor("--help")
    assert shown.code == 0
    for command in ("run", "check", "methods", "models", "data", "report", "chat"):
        assert re.search(rf"^  {command} ", shown.out, flags=re.M)
    for option in ("--set", "--seed", "--out", "--resume"):
        assert option in fedtailor("run", "--help").out


def test_the_report_is_written_anew(fedtailor: Command, whole: Whole) -> None:
    page = whole.folder / "report.html"
    page.unlink()
    ended = fedtailor("report", whole.folder)
    assert ended.code == 0
    assert page.is_file()
    assert "federated" in ended.out
    fails(fedtailor("report", "nowhere"), 2, "nowhere is not the folder of a finished run")


def test_chat_answers_a_line_with_a_label(fedtailor: Command, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("The soup was lovely.\nThe soup was cold.\n\nnot read\n"))
    ended = fedtailor("chat", whole.folder)
    assert ended.code == 0
    assert [line in ("good", "bad") for line in ended.out.split()] == [True, True]
    fails(fedtailor("chat", "nowhere"), 2, "nowhere: no finished run there")
