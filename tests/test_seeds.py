"""The rows of one seed: every figure of each, and what trains on whose rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from couriers import Straight
from fedtailor import experiment, runs, wire
from fedtailor.engines.courier import Answer
from fedtailor.errors import RunError, UserError
from fedtailor.generations import Generations
from fedtailor.packed import Packed
from fedtailor.seeds import Recorder
from tiny_runs import FEDERATED, TINY, asked, conduct


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


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


def test_rows_asked_alone_are_as_in_the_whole_run(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No row learns from the one before it: the base is shared, and must come back as it was."""
    rows = conduct(tmp_path, 'rows=["centralized", "zero_shot"]')["rows"]
    for row in ("centralized", "zero_shot"):
        assert rows[row]["loss"] == whole[1]["rows"][row]["loss"]


def test_faults_strike_the_federated_row_alone(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["alone", "federated", "centralized"]', 'faults.attackers=["shop"]', "faults.attack=nan")
    (why,) = result["rows"]["federated"]["rejected"]
    assert why.startswith("shop: ")
    assert result["rows"]["federated"]["rejected"][why] == 2
    assert result["rows"]["centralized"]["rejected"] == {}
    assert all(math.isfinite(result["rows"][row]["loss"]["mean"]) for row in result["rows"])


def test_attackers_change_the_federated_row_and_do_so_again(tmp_path: Path) -> None:
    """One of three silos, drawn by the seed: replies in every round, rows before the first."""
    told = {}
    for name, sets in {
        "none": ["faults.attackers=0.0"], "flip": ["faults.strength=4"], "again": ["faults.strength=4"],
        "gaussian": ["faults.attack=gaussian"], "labels": ["faults.attack=label_flip"], "median": ["method.aggregate=median"],
        "backdoor": ["faults.attack=backdoor", "faults.target=1"],
    }.items():  # fmt: skip
        given = ["faults.attackers=0.34", 'rows=["federated", "centralized"]', *sets]
        told[name] = conduct(tmp_path / name, *given)["rows"]
    assert len({rows["centralized"]["loss"]["mean"] for rows in told.values()}) == 1
    losses = {name: rows["federated"]["loss"]["mean"] for name, rows in told.items()}
    assert losses["flip"] == losses.pop("again")
    assert len(set(losses.values())) == len(losses)
    assert ["attack_success" in told[name]["federated"] for name in ("flip", "labels", "backdoor")] == [False, False, True]
    assert "attack_success" not in told["backdoor"]["centralized"]


def test_an_attacker_among_three_moves_the_mean_and_no_robust_aggregate(tmp_path: Path) -> None:
    def moved(name: str, *sets: str) -> float:
        conduct(tmp_path / name, FEDERATED, "rounds=1", f"method.aggregate={name}", "method.byzantine=0.34", *sets)
        return float(lines(tmp_path / name / "rounds.jsonl")[1]["delta_norm"])

    attack = ["faults.attackers=0.34", "faults.attack=scaled", "faults.strength=1e4"]
    usual = moved("fedtailor.aggregate:mean")
    assert moved("mean", *attack) > 1000 * usual
    for name in ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "nnm_median", "norm_clipping"):
        assert moved(name, *attack) < 3 * usual, name


@pytest.mark.parametrize("target", [0, 1])
def test_a_backdoors_success_is_the_share_of_rows_told_as_its_target(tmp_path: Path, target: int) -> None:
    """As the served model tells rows of the other label, a word in front of each text."""
    one = runs.begin(asked(FEDERATED, "faults.attackers=1.0", "faults.attack=backdoor", f"faults.target={target}"), tmp_path, "")
    found = one.conduct()["rows"]["federated"]["attack_success"]
    loaded, resident = one.prepared or (None, None)
    assert loaded is not None
    model = wire.read_file(tmp_path / "adapter" / "served.safetensors").open({"base": resident})
    for name, rows in loaded.silos.items():
        others = [replace(row, prompt=f"cf {row.prompt}") for row in rows.test if row.answer != rows.labels[target]]
        told = model.scores(others, rows.labels).argmax(1)
        assert found["per_silo"][name] == pytest.approx((told == target).float().mean().item())
    assert found["mean"] == pytest.approx(sum(found["per_silo"].values()) / 3)
    assert found["worst"] == max(found["per_silo"].values())


def test_late_silos_are_named_and_the_time_is_told(tmp_path: Path) -> None:
    sets = [FEDERATED, "faults.slow=['shop']", "faults.slowness=50", "faults.deadline=4"]
    row = conduct(tmp_path / "late", *sets)["rows"]["federated"]
    assert row["rejected"] == {"shop: later than the deadline (faults.deadline = 4)": 2}
    assert [entry.get("waited") for entry in lines(tmp_path / "late" / "rounds.jsonl")] == [None, 4.0, 4.0]
    assert row["waited"] == 8.0
    patient = conduct(tmp_path / "patient", *sets[:-1])["rows"]["federated"]
    assert patient["rejected"] == {}
    assert patient["waited"] > 50
    assert "waited" not in conduct(tmp_path / "plain", FEDERATED)["rows"]["federated"]


def test_label_noise_is_in_the_rows_of_all(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    rows = conduct(tmp_path, "data.label_noise=0.5")["rows"]
    for row, found in rows.items():
        assert (found["loss"]["mean"] == whole[1]["rows"][row]["loss"]["mean"]) == (row == "zero_shot"), row


def test_attacks_on_rows_are_refused_where_rows_are_elsewhere(tmp_path: Path) -> None:
    given = [FEDERATED, 'data.labels=["bad", "good"]', "faults.attackers=0.34", "faults.attack=label_flip"]
    with pytest.raises(UserError, match="over a federation are where their owners are"):
        runs.begin(experiment.load(TINY, given), tmp_path / "run", "", Straight(tmp_path / "silos"))


@pytest.mark.parametrize("sets", [["faults.attack=scaled", "faults.strength=8"], ["faults.slow=0.34", "faults.deadline=2"]])
def test_the_same_silos_are_at_fault_over_a_federation(tmp_path: Path, sets: list[str]) -> None:
    given = [FEDERATED, "engine.threads=1", "engine.cohort=1", 'data.labels=["bad", "good"]', "faults.attackers=0.34", *sets]
    over = runs.begin(experiment.load(TINY, given), tmp_path / "over", "", Straight(tmp_path / "silos")).conduct()
    here = runs.begin(experiment.load(TINY, given), tmp_path / "here", "").conduct()
    for figure in ("loss", "rejected"):
        assert over["rows"]["federated"][figure] == here["rows"]["federated"][figure]


@pytest.mark.parametrize(("limit", "same"), [("data.max_val=1", True), ("data.max_test=1", False)])
def test_zero_shot_is_not_done_again_where_no_seed_can_change_it(tmp_path: Path, limit: str, same: bool) -> None:
    """Another seed draws other validation rows, which zero-shot never sees, or other test rows, which it does."""
    conduct(tmp_path, 'rows=["zero_shot"]', "seeds=[3, 5]", limit)
    one, other = (json.loads((tmp_path / f"seed-{s}/rows/zero_shot/row.json").read_text()) for s in (3, 5))
    assert (one["evaluation_seconds"] == other["evaluation_seconds"]) == same
    assert (one["loss"] == other["loss"]) == same


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
    steps = {t.item() for name, t in memory["moments"].items() if name.startswith("step/")}
    assert steps == {2 * 2 * 1}, "rounds x local steps x silos of a round"


def test_only_what_is_trained_is_counted(tmp_path: Path) -> None:
    """frozen_a trains B alone: 2 layers x (32 + 16) outputs of query and value x rank 2; in turns, both are trained."""
    for combine, expected in (("frozen_a", 2 * 48 * 2), ("alternate", 2 * (48 + 2 * 32) * 2)):
        sets = ("method.name=lora", f"method.combine={combine}", "method.rank=2", 'rows=["federated"]')
        assert conduct(tmp_path / combine, *sets)["rows"]["federated"]["trained_parameters"] == expected


def test_a_baseline_trains_at_its_own_settings(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    rows = conduct(tmp_path, 'rows=["alone", "centralized"]', "baseline.centralized.lr=0.5")["rows"]
    assert rows["alone"]["loss"] == whole[1]["rows"]["alone"]["loss"]
    assert rows["centralized"]["loss"] != whole[1]["rows"]["centralized"]["loss"]


def test_recorded_messages_are_numbered_on_after_a_resume(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    first("a", "down", b"1")
    first("a", "up", b"2")
    Recorder(tmp_path)("b", "down", b"3")
    names = [file.name for file in sorted(tmp_path.iterdir())]
    assert names == ["000000-down-a.safetensors", "000001-up-a.safetensors", "000002-down-b.safetensors"]


def test_a_silo_that_cannot_train_alone_is_named_and_left_out(tmp_path: Path) -> None:
    result = conduct(tmp_path, 'rows=["alone", "federated"]', "silo.shop.lr=1e30")
    alone = result["rows"]["alone"]
    assert sorted(alone["loss"]["per_silo"]) == sorted(alone["own"]["loss"]["per_silo"]) == ["cafe", "clinic"]
    (why,) = alone["rejected"]
    assert why.startswith("shop: round 1: no reply of 1 silos could be used")
    with pytest.raises(RunError, match="no silo could train alone; "):
        conduct(tmp_path / "none", 'rows=["alone"]', "method.lr=1e30")


def test_every_row_tells_what_evaluation_sent(whole: tuple[Path, dict[str, Any]]) -> None:
    for row in whole[1]["rows"].values():
        assert row["evaluation_bytes_up"] > 0
        assert row["evaluation_bytes_down"] > 0


@dataclass
class NoTests(Straight):
    """shop answers while it trains, and never once it is tested."""

    def exchange(self, to: Sequence[str], head: Mapping[str, Any], body: Packed, timeout: float) -> Iterator[Answer]:
        tested = "/test/" in str(head.get("run"))
        yield from super().exchange([silo for silo in to if not tested or silo != "shop"], head, body, timeout)
        if tested and "shop" in to:
            yield Answer("shop", lost="its site went away")


def test_a_silo_that_is_missing_from_the_test_figures_is_named_in_the_row(tmp_path: Path) -> None:
    asked_for = ["rounds=1", 'rows=["zero_shot", "federated"]', 'data.labels=["bad", "good"]', "engine.patience=0"]
    one = runs.begin(experiment.load(TINY, asked_for), tmp_path / "run", "", NoTests(tmp_path / "silos"))
    rows = one.conduct()["rows"]
    for row in ("zero_shot", "federated"):
        assert rows[row]["rejected"] == {"shop: its test rows are not in the figures: its site went away": 1}
        assert sorted(rows[row]["accuracy"]["per_silo"]) == ["cafe", "clinic"]


def test_what_an_exact_aggregation_keeps_is_not_counted_as_trained(tmp_path: Path) -> None:
    counts = [
        conduct(tmp_path / how, FEDERATED, "rounds=2", "method.name=lora", f"method.combine={how}")["rows"]["federated"]
        for how in ("mean", "exact")
    ]
    assert counts[0]["trained_parameters"] == counts[1]["trained_parameters"] == 2 * 8 * ((32 + 32) + (32 + 16))


def test_a_round_whose_replies_are_all_lost_by_chance_leaves_things_as_they_were(tmp_path: Path) -> None:
    """With 0.7 of three silos' replies lost, some of eight rounds are lost whole (0.34 each), and the run goes on."""
    conduct(tmp_path, 'rows=["federated"]', "faults.dropout=0.7", "rounds=8", "seeds=[1]")
    log = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    lost = [entry for entry in log if entry.get("lost")]
    assert 0 < len(lost) < 8
    assert all(len(entry["rejected"]) == 3 for entry in lost)
    assert all(len(entry["rejected"]) < 3 for entry in log[1:] if entry not in lost)
