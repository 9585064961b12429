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
from fedtailor.errors import RunError, UserError
from fedtailor.experiment import Experiment, as_table
from fedtailor.generations import Generations
from fedtailor.merging import merge
from fedtailor.seeds import Recorder

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
ONE_THREAD = "engine.threads=1"
FEDERATED = 'rows=["federated"]'


def asked(*sets: str) -> Experiment:
    return experiment.load(TINY, [ONE_THREAD, "engine.cohort=1", *sets])


def conduct(folder: Path, *sets: str) -> dict[str, Any]:
    return runs.begin(asked(*sets), folder, "a test").conduct()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run with all its rows and every message kept. Left as it is by every test."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, conduct(folder, "engine.record=true")


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


def test_every_row_has_every_figure(whole: tuple[Path, dict[str, Any]]) -> None:
    for row, found in whole[1]["rows"].items():
        for metric in ("accuracy", "macro_f1", "loss"):
            silos = found[metric]["per_silo"]
            assert sorted(silos) == ["cafe", "clinic", "shop"], row
            assert found[metric]["mean"] == pytest.approx(sum(silos.values()) / 3)
            assert found[metric]["worst"] == (max if metric == "loss" else min)(silos.values())
        for figure in ("bytes_up", "bytes_down", "trained_parameters"):
            assert isinstance(found[figure], int)
            assert (found[figure] == 0) == (row in ("zero_shot", "few_shot")), (row, figure)
        assert found["seconds"] >= 0
        assert found["peak_memory_mb"] > 50, "a process with torch in it"
        assert [sample["silo"] for sample in found["samples"]] == ["cafe", "clinic", "shop", "cafe"]
        assert all(sample["generated"] in ("bad", "good") for sample in found["samples"])


def test_trained_parameters_are_those_of_the_prefix(whole: tuple[Path, dict[str, Any]]) -> None:
    # 4 virtual tokens x 2 layers x keys and values x 2 heads of width 8
    assert whole[1]["rows"]["federated"]["trained_parameters"] == 4 * 2 * 2 * 16
    assert whole[1]["rows"]["centralized"]["trained_parameters"] == 256


def test_bytes_are_those_of_the_messages(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    messages = sorted((folder / "messages").iterdir())
    assert [int(file.name[:6]) for file in messages] == list(range(len(messages)))
    log = lines(folder / "rounds.jsonl")
    for way in ("up", "down"):
        sent = sum(file.stat().st_size for file in messages if file.name[7:].startswith(f"{way}-"))
        assert sent == sum(entry[f"bytes_{way}"] + entry[f"evaluation_bytes_{way}"] for entry in log)
        assert result["rows"]["federated"][f"bytes_{way}"] == sum(entry[f"bytes_{way}"] for entry in log)
    trained = [file for file in messages if type(wire.read_file(file)).__name__ == "Trained"]
    assert [file.name[10:].removesuffix(".safetensors") for file in trained] == ["cafe", "clinic", "shop"] * 2
    in_rounds = sum(entry["bytes_up"] for entry in log[1:])
    assert sum(file.stat().st_size for file in trained) == in_rounds


def test_no_row_leaves_a_silo(whole: tuple[Path, dict[str, Any]]) -> None:
    """Not one text of the data is in any message up, nor in one down."""
    texts = [json.loads(line)["text"].encode() for line in TINY.with_name("tiny.jsonl").read_text().splitlines()]
    for file in (whole[0] / "messages").iterdir():
        held = file.read_bytes()
        assert not any(text in held for text in texts), file.name


def test_alone_is_each_silos_model_over_all_and_over_its_own(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    alone = result["rows"]["alone"]
    parts = {
        s: json.loads((folder / "rows" / "alone" / s / "row.json").read_text()) for s in ("cafe", "clinic", "shop")
    }
    for metric in ("accuracy", "loss"):
        assert alone[metric]["per_silo"] == {s: part[metric]["mean"] for s, part in parts.items()}
        assert alone["own"][metric]["per_silo"] == {s: part[metric]["per_silo"][s] for s, part in parts.items()}
    for figure in ("bytes_up", "seconds"):
        assert alone[figure] == pytest.approx(sum(part[figure] for part in parts.values()))


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


def test_rows_asked_alone_are_as_in_the_whole_run(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No row learns from the one before it: the base is shared, and must come back as it was."""
    rows = conduct(tmp_path, 'rows=["centralized", "zero_shot"]')["rows"]
    for row in ("centralized", "zero_shot"):
        assert rows[row]["loss"] == whole[1]["rows"][row]["loss"]


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


def test_faults_strike_the_federated_row_alone(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["alone", "federated", "centralized"]', 'faults.nan=["shop"]')
    (why,) = result["rows"]["federated"]["rejected"]
    assert why.startswith("shop: ")
    assert result["rows"]["federated"]["rejected"][why] == 2
    assert result["rows"]["centralized"]["rejected"] == {}
    assert all(math.isfinite(result["rows"][row]["loss"]["mean"]) for row in result["rows"])


@pytest.mark.parametrize(("limit", "same"), [("data.max_val=1", True), ("data.max_test=1", False)])
def test_zero_shot_is_not_done_again_where_no_seed_can_change_it(tmp_path: Path, limit: str, same: bool) -> None:
    """Another seed draws other validation rows, which zero-shot never sees, or other test rows, which it does."""
    conduct(tmp_path, 'rows=["zero_shot"]', "seeds=[3, 5]", limit)
    one, other = (json.loads((tmp_path / f"seed-{s}/rows/zero_shot/row.json").read_text()) for s in (3, 5))
    assert (one["evaluation_seconds"] == other["evaluation_seconds"]) == same
    assert (one["loss"] == other["loss"]) == same


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


def row(accuracy: tuple[float, float], **more: Any) -> dict[str, Any]:
    per_silo = dict(zip("ab", accuracy, strict=True))
    metric = {"mean": sum(accuracy) / 2, "worst": min(accuracy), "per_silo": per_silo}
    return {"accuracy": metric, "bytes_up": 10, "trained_parameters": 7, "rounds": 4, "peak_memory_mb": 5.0, **more}


def test_a_merge_by_hand() -> None:
    merged = merge(
        {
            1: {
                "federated": row((0.5, 0.7), bytes_up=10, peak_memory_mb=5.0, rejected={"a: nan": 1}, samples=["first"])
            },
            2: {"federated": row((0.7, 0.9), bytes_up=20, peak_memory_mb=9.0, rejected={"a: nan": 2, "b: late": 1})},
            4: {"federated": row((0.3, 0.8), bytes_up=60, peak_memory_mb=6.0, rejected={}, only_here=1)},
        }
    )["federated"]
    # means .6, .8, .55: their mean .65; deviations -.05, .15, -.1: sqrt((.0025 + .0225 + .01) / 2)
    assert merged["accuracy"]["mean"] == pytest.approx(0.65)
    assert merged["accuracy"]["spread"] == pytest.approx(math.sqrt(0.0175))
    assert merged["accuracy"]["by_seed"] == pytest.approx({"1": 0.6, "2": 0.8, "4": 0.55})
    assert merged["accuracy"]["worst"] == pytest.approx(0.5)
    assert merged["accuracy"]["per_silo"] == pytest.approx({"a": 0.5, "b": 0.8})
    assert (merged["bytes_up"], merged["peak_memory_mb"]) == (30, 9.0)
    assert (merged["trained_parameters"], merged["rounds"]) == (7, 4)
    assert merged["rejected"] == {"a: nan": 3, "b: late": 1}
    assert "only_here" not in merged
    assert "samples" not in merged


def test_a_merge_of_silos_that_not_every_seed_has() -> None:
    """A partition deals anew for each seed: a silo may lack test rows under one of them."""
    few = row((0.4, 0.8))
    few["accuracy"] = {"mean": 0.4, "worst": 0.4, "per_silo": {"a": 0.4}}
    for order in ([row((0.6, 1.0)), few], [few, row((0.6, 1.0))]):
        merged = merge({i: {"federated": part} for i, part in enumerate(order)})["federated"]["accuracy"]
        assert merged["mean"] == pytest.approx(0.6)
        assert merged["per_silo"]["a"] == pytest.approx(0.5)


def test_own_figures_are_merged_too() -> None:
    own = {"accuracy": row((0.2, 0.4))["accuracy"]}, {"accuracy": row((0.6, 0.8))["accuracy"]}
    merged = merge({i: {"alone": row((0.5, 0.5), own=part)} for i, part in enumerate(own)})["alone"]["own"]
    assert merged["accuracy"]["mean"] == pytest.approx(0.5)
    assert merged["accuracy"]["per_silo"] == pytest.approx({"a": 0.4, "b": 0.6})


def test_silos_with_names_that_are_no_file_names_run(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "../up", "é" * 80, "x" * 300]
    source = tmp_path / "rows.jsonl"
    with source.open("w") as file:
        for name in names:
            for i in range(8):
                split = ("train", "val", "test")[max(0, i - 5)]
                said = {"site": name, "text": f"{name[:5]} {i}", "mood": ("bad", "good")[i % 2], "split": split}
                file.write(json.dumps(said) + "\n")
    sets = [f"data.source={source}", "data.val_fraction=0", "data.test_fraction=0", "engine.record=true", "rounds=1"]
    result = conduct(tmp_path / "out", *sets, 'rows=["alone", "federated"]')
    assert sorted(result["rows"]["alone"]["loss"]["per_silo"]) == sorted(names)
    assert len([f for f in (tmp_path / "out" / "rows" / "alone").iterdir() if f.is_dir()]) == len(names)
    assert {f.name for f in tmp_path.iterdir()} == {"rows.jsonl", "out"}, "nothing was written beside the folder"


# SIGKILL at random moments. Children are forked from a process that has everything imported, so they start at once.

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
    ],
)
def test_a_run_killed_at_random_moments_ends_in_the_same_tensors(
    method: str, more: Sequence[str], tmp_path: Path
) -> None:
    settings = {"lora": "rank=2", "prefix": "virtual_tokens=3"}[method]
    table = f"method={{name='{method}', {settings}, local_steps=1, batch_size=2, optimizer_state='keep', lr=0.05}}"
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


def test_a_silo_that_cannot_be_scored_ends_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean would be over other silos than the rows beside it."""
    one = runs.begin(asked(FEDERATED), tmp_path, "")
    test_rows = one.prepared[0].silos["shop"]  # type: ignore[index]
    long = replace(test_rows.test[0], prompt="p" * 600)
    one.prepared[0].silos["shop"] = replace(test_rows, test=(long,))  # type: ignore[index]
    with pytest.raises(RunError, match="test rows could not be scored: shop: a row has 60"):
        one.conduct()


def test_centralized_sees_as_many_rows_as_federated_when_few_take_part(tmp_path: Path) -> None:
    rows = conduct(tmp_path, 'rows=["federated", "centralized"]', "participation=0.34")["rows"]
    log = [json.loads(line) for line in (tmp_path / "rows/federated/rounds.jsonl").read_text().splitlines()]
    assert [len(entry["silos"]) for entry in log[1:]] == [1, 1]
    # 4 virtual tokens x 2 layers x 2 x 16 numbers: what is trained is the same; only steps could differ
    assert rows["federated"]["trained_parameters"] == rows["centralized"]["trained_parameters"] == 256
    state = Generations(tmp_path / "rows" / "centralized").newest()
    assert state is not None
    memory = state.memories["all_silos"]
    assert memory["moments"]["step"].item() == 2 * 2 * 1, "rounds x local steps x silos of a round"


def test_a_baseline_trains_at_its_own_settings(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    rows = conduct(tmp_path, 'rows=["alone", "centralized"]', "baseline.centralized.lr=0.5")["rows"]
    assert rows["alone"]["loss"] == whole[1]["rows"]["alone"]["loss"]
    assert rows["centralized"]["loss"] != whole[1]["rows"]["centralized"]["loss"]


def test_a_resume_on_another_base_is_refused(tmp_path: Path) -> None:
    one = runs.begin(asked(FEDERATED), tmp_path, "")
    one.conduct()
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["sha256"]["model"] = "0" * 64
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="the base model or its dtype changed since this run began"):
        runs.resume(tmp_path).conduct()


def test_recorded_messages_are_numbered_on_after_a_resume(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    first("a", "down", b"1")
    first("a", "up", b"2")
    Recorder(tmp_path)("b", "down", b"3")
    names = [file.name for file in sorted(tmp_path.iterdir())]
    assert names == ["000000-down-a.safetensors", "000001-up-a.safetensors", "000002-down-b.safetensors"]


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

    def prepare(experiment: Experiment) -> Any:
        monkeypatch.setattr(runs, "prepare", real)
        others.append(runs.begin(experiment, None, "the other"))  # begun while this one is still loading
        return real(experiment)

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
    with pytest.raises(UserError, match=r"experiment\.toml changed since this run began; bring it back, or start a new run"):
        runs.resume(tmp_path).conduct()


def test_a_silo_that_cannot_train_alone_is_named_and_left_out(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["alone", "federated"]', "silo.shop.lr=1e30")
    alone = result["rows"]["alone"]
    assert sorted(alone["loss"]["per_silo"]) == sorted(alone["own"]["loss"]["per_silo"]) == ["cafe", "clinic"]
    (why,) = alone["rejected"]
    assert why.startswith("shop: round 1: no reply of 1 silos could be used")
    with pytest.raises(RunError, match="no silo could train alone; "):
        conduct(tmp_path / "none", 'rows=["alone"]', "method.lr=1e30")


def test_the_page_does_not_say_where_the_rows_lie(tmp_path: Path) -> None:
    conduct(tmp_path, FEDERATED)
    page = report.write(tmp_path).read_text()
    assert "tiny.jsonl" in page
    assert str(TINY.parent) not in page


def test_every_row_tells_what_evaluation_sent(whole: tuple[Path, dict[str, Any]]) -> None:
    for row in whole[1]["rows"].values():
        assert row["evaluation_bytes_up"] > 0
        assert row["evaluation_bytes_down"] > 0
