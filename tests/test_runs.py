"""A run's folder: what is in it, what is done again and what not, and that a kill changes no tensor of the end."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import experiment, report, runs, wire
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment, as_table
from fedtailor.generations import Generations
from tiny_runs import FEDERATED, TINY, asked, conduct


def test_the_result_is_what_is_in_the_folder(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["version"], result["name"], result["seeds"], result["command"]) == (1, "tiny", [0], "a test")
    expected = experiment.as_table(asked("engine.record=true"))
    expected["data"]["source"] = "tiny.jsonl"
    assert result["experiment"] == expected
    assert list(result["rows"]) == ["zero_shot", "few_shot", "alone", "federated", "centralized"]
    environment = result["environment"]
    assert (environment["torch"], environment["threads"], environment["dtype"]) == (torch.__version__, 1, "float32")
    assert len(environment["data_sha256"]) == len(environment["model_sha256"]) == 64
    assert environment["plan"] == json.loads((folder / "plan.json").read_text())


def test_the_folder_holds_the_adapter_and_no_half_files(whole: tuple[Path, dict[str, Any]]) -> None:
    folder = whole[0]
    served = wire.read_file(folder / "adapter" / "served.safetensors")
    assert sum(t.numel() for t in served.tensors.values()) == 256
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert list(folder.rglob("*.tmp")) == []


def test_the_same_experiment_gives_the_same_result(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED)
    mine, theirs = (Generations(f / "rows" / "federated") for f in (tmp_path, whole[0]))
    assert everything(mine) == everything(theirs)
    assert everything(mine)["state"] != b""


def test_another_seed_gives_another(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED, "seeds=[1]")
    mine, theirs = (Generations(f / "rows" / "federated") for f in (tmp_path, whole[0]))
    assert everything(mine)["state"] != everything(theirs)["state"]


def test_a_taken_name_gets_a_number_and_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = runs.begin(asked(), None, "one")
    before = (first.folder / "experiment.toml").read_bytes()
    folders = [runs.begin(asked("rounds=9"), None, "two").folder for _ in range(2)]
    assert [first.folder, *folders] == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]
    assert (first.folder / "experiment.toml").read_bytes() == before


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty; choose another, or go on with"):
        runs.begin(asked(), tmp_path, "")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_without_a_run_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run there \(no experiment.toml\)"):
        runs.resume(tmp_path)


def test_another_experiment_cannot_go_on_in_a_runs_folder(tmp_path: Path) -> None:
    runs.begin(asked(), tmp_path, "")
    assert runs.resume(tmp_path, asked()).experiment == asked()
    with pytest.raises(UserError, match=r"holds another experiment \(differs in method, rounds\)"):
        runs.resume(tmp_path, asked("rounds=3", "method.lr=0.5"))


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    conduct(tmp_path, 'rows=["zero_shot", "federated"]')
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name not in ("result.json", ".lock")]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}
    result = json.loads((tmp_path / "result.json").read_text())
    assert runs.resume(tmp_path).conduct() == result
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files} == before


def test_a_missing_row_is_done_and_the_others_are_not(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["zero_shot", "federated"]')
    (tmp_path / "rows" / "federated" / "row.json").unlink()
    told = (tmp_path / "rows" / "zero_shot" / "row.json").stat().st_mtime_ns
    again = runs.resume(tmp_path).conduct()
    assert again["rows"]["federated"]["loss"] == result["rows"]["federated"]["loss"]
    assert again["rows"]["federated"]["bytes_up"] == result["rows"]["federated"]["bytes_up"]
    assert (tmp_path / "rows" / "zero_shot" / "row.json").stat().st_mtime_ns == told


def test_the_plan_of_the_first_start_is_used_on_every_later_one(tmp_path: Path) -> None:
    one = runs.begin(asked(FEDERATED, "engine.cohort=auto", "engine.threads=0"), tmp_path, "")
    plan = {"threads": 1, "cohort": {"fedtailor.methods.averaging:train": 2}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = one.conduct()
    known = result["environment"]
    settings = json.loads((tmp_path / "plan.json").read_text())["sha256"]["experiment"]
    plan["sha256"] = {"experiment": settings, "model": known["model_sha256"], "data of seed 0": known["data_sha256"]}
    assert result["environment"]["plan"] == plan
    assert (result["environment"]["cohort"], result["environment"]["threads"]) == (2, 1)
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_a_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    rows = TINY.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    folder = tmp_path / "run"
    one = runs.begin(asked(FEDERATED, f"data.source={tmp_path / 'rows.jsonl'}"), folder, "")
    one.conduct()
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(UserError, match="the data changed since this run began"):
        runs.resume(folder).conduct()


def test_one_process_per_folder(tmp_path: Path) -> None:
    one = runs.begin(asked(FEDERATED), tmp_path, "")
    with runs.locked(tmp_path), pytest.raises(UserError, match="another process is running this"):
        one.conduct()
    one.conduct()


def test_bad_data_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'moood'"):
        conduct(tmp_path, "data.label=moood", "model.name=nowhere/at-all")


def test_several_seeds_are_merged(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["zero_shot", "federated"]', "seeds=[3, 5]")
    parts = {seed: json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text()) for seed in (3, 5)}
    assert [part["seeds"] for part in parts.values()] == [[3], [5]]
    one, other = (part["rows"]["federated"]["loss"]["mean"] for part in parts.values())
    merged = result["rows"]["federated"]["loss"]
    assert one != other
    assert merged["by_seed"] == {"3": one, "5": other}
    assert merged["mean"] == pytest.approx((one + other) / 2)
    assert merged["spread"] == pytest.approx(abs(one - other) / math.sqrt(2))
    assert result["seeds"] == [3, 5]
    assert result["rows"]["zero_shot"]["loss"]["spread"] == 0
    assert result["rows"]["zero_shot"]["peak_memory_mb"] == parts[3]["rows"]["zero_shot"]["peak_memory_mb"]
    first, second = ((tmp_path / f"seed-{seed}" / "adapter" / "served.safetensors").read_bytes() for seed in (3, 5))
    assert first != second
    assert not (tmp_path / "adapter").exists(), "each seed has its own"


CONTEXT = multiprocessing.get_context("forkserver")


CONTEXT.set_forkserver_preload(
    ["fedtailor.runs", "fedtailor.report", "peft", "transformers.models.llama.modeling_llama"]
)


ROUNDS = 16


def go_on(folder: str) -> None:
    """In the child: what `fedtailor run --resume` does."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    runs.resume(Path(folder)).conduct()


def everything(kept: Generations) -> dict[str, bytes]:
    """The newest generation's server state, every silo's memory and the best state: as the bytes they are."""
    found = kept.newest()
    assert found is not None
    memories, best = found.memories, found.best
    assert [entry["round"] for entry in found.log] == list(range(found.round + 1))
    return {
        "round": str(found.round).encode(),
        "state": wire.pack(found.state),
        "best": b"" if best is None else wire.pack(best),
        **{f"memory of {silo}": wire.pack(memory_body(values)) for silo, values in sorted(memories.items())},
    }


def memory_body(values: Mapping[str, Any]) -> Any:
    from fedtailor.generations import Memory

    return Memory({key: values[key] for key in sorted(values)})


def done(folder: Path) -> int:
    log = folder / "rows" / "federated" / "rounds.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", ["engine.cohort=1", "participation=0.67"]),
        ("lora", ["engine.cohort=2"]),
        ("prefix", ["engine.cohort=1"]),
        ("prefix", ["engine.cohort=2", "method.server_optimizer=adam"]),
        ("distill", ["data.public_fraction=0.2"]),
    ],
)
def test_a_run_killed_at_random_moments_ends_in_the_same_tensors(
    method: str, more: Sequence[str], tmp_path: Path
) -> None:
    training = "local_steps=1, batch_size=2, optimizer_state='keep', lr=0.05"
    settings = {
        "lora": f"rank=2, {training}", "prefix": f"virtual_tokens=3, {training}",
        "distill": f"trainer={{name='lora', rank=2, {training}}}, public_rows=4, digest_steps=1",
    }[method]  # fmt: skip
    table = f"method={{name='{method}', {settings}}}"
    one = asked(FEDERATED, table, f"rounds={ROUNDS}", *more)
    one = replace(one, evaluate=replace(one.evaluate, every=5))
    undisturbed = runs.begin(one, tmp_path / "undisturbed", "").conduct()
    folder = runs.begin(one, tmp_path / "killed", "").folder

    dice = random.Random(f"{method} {more}")
    kills = []
    for _ in range(3):
        child = CONTEXT.Process(target=go_on, args=(str(folder),))
        before = done(folder)
        wanted = before + dice.randint(1, 3)
        child.start()
        while child.is_alive() and done(folder) < wanted:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.04))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it ended by itself"
        kills.append(done(folder))
    assert 0 < kills[0] <= kills[1] <= kills[2] <= ROUNDS

    child = CONTEXT.Process(target=go_on, args=(str(folder),))
    child.start()
    child.join()
    assert child.exitcode == 0
    mine, theirs = (everything(Generations(f / "rows" / "federated")) for f in (folder, tmp_path / "undisturbed"))
    assert list(mine) == list(theirs)
    assert [part for part in mine if mine[part] != theirs[part]] == []
    assert len(mine) == 6, "the state, the best, and three silos that remember their optimizer"
    served = (wire.read_file(f / "adapter" / "served.safetensors") for f in (folder, tmp_path / "undisturbed"))
    assert len({wire.pack(one) for one in served}) == 1
    result = json.loads((folder / "result.json").read_text())
    for figure in ("loss", "accuracy", "bytes_up", "bytes_down", "best_round"):
        assert result["rows"]["federated"][figure] == undisturbed["rows"]["federated"][figure]


def test_a_resume_on_another_base_is_refused(tmp_path: Path) -> None:
    one = runs.begin(asked(FEDERATED), tmp_path, "")
    one.conduct()
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["sha256"]["model"] = "0" * 64
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="the base model or its dtype changed since this run began"):
        runs.resume(tmp_path).conduct()


@pytest.mark.parametrize("file", ["plan.json", "rows/federated/row.json"])
def test_a_damaged_record_is_named(tmp_path: Path, file: str) -> None:
    conduct(tmp_path, FEDERATED)
    (tmp_path / file).write_text("{")
    with pytest.raises(UserError, match=rf"{file}: damaged .*; delete it"):
        runs.resume(tmp_path).conduct()


def test_a_run_can_be_run_again_from_its_own_file(tmp_path: Path) -> None:
    conduct(tmp_path / "one", FEDERATED)
    again = experiment.load(tmp_path / "one" / "experiment.toml")
    assert as_table(again) == as_table(asked(FEDERATED))


def test_the_result_does_not_say_where_the_rows_lie(tmp_path: Path) -> None:
    assert conduct(tmp_path, FEDERATED)["experiment"]["data"]["source"] == "tiny.jsonl"


def test_two_starts_at_once_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = runs.prepare

    def prepare(experiment: Experiment, afar: Sequence[str]) -> Any:
        monkeypatch.setattr(runs, "prepare", real)
        others.append(runs.begin(experiment, None, "the other"))  # begun while this one is still loading
        return real(experiment, afar)

    others: list[runs.Run] = []
    monkeypatch.setattr(runs, "prepare", prepare)
    one = runs.begin(asked(FEDERATED), None, "one")
    assert (one.folder, others[0].folder) == (Path("runs/tiny"), Path("runs/tiny-2"))


def test_what_cannot_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        runs.begin(asked("data.label=nowhere"), tmp_path / "a" / "b", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        runs.begin(asked("data.label=nowhere"), tmp_path / "mine", "")
    assert list((tmp_path / "mine").iterdir()) == [], "a folder that was there stays"


def test_a_run_whose_settings_were_changed_is_refused(tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED)
    file = tmp_path / "experiment.toml"
    file.write_text(file.read_text().replace("rounds = 2", "rounds = 5"))
    with pytest.raises(
        UserError, match=r"experiment\.toml changed since this run began; bring it back, or start a new run"
    ):
        runs.resume(tmp_path).conduct()


def test_the_page_does_not_say_where_the_rows_lie(tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED)
    page = report.write(tmp_path).read_text()
    assert "tiny.jsonl" in page
    assert str(TINY.parent) not in page
