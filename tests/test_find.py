"""Methods and aggregators are found by existing: a file of ours, or "package.module:name" of anyone's."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from fedtailor import aggregate, cli, data, experiment, find, progress, wire
from fedtailor.errors import UserError
from fedtailor.methods.prefix import Prefix

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def test_the_methods_are_the_files_that_hold_one() -> None:
    found = find.methods()
    assert {"prefix", "lora", "full"} <= set(found)
    assert "averaging" not in found, "a template is no method"
    for name, kind in found.items():
        assert kind.__module__ == f"fedtailor.methods.{name}"
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        assert find.method(name) is kind


def test_a_method_of_another_package_is_found_by_its_address() -> None:
    assert find.method("fedtailor.methods.prefix:Prefix") is Prefix


@pytest.mark.parametrize("name", ["loar", "averaging", "", "_prefix", "../prefix", "methods.prefix"])
def test_an_unknown_method_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UserError, match=r"no such method.*\(choices: adapter, .*full, .*lora, .*prefix.*\); or give"):
        find.method(name)


def test_a_misspelt_method_is_corrected() -> None:
    with pytest.raises(UserError, match=r"method\.name = 'loar': no such method; did you mean 'lora'"):
        find.method("loar")


@pytest.mark.parametrize("name", ["nowhere_at_all:Mine", "json:Mine", "json:", ":Mine", ":"])
def test_what_cannot_be_imported_is_said(name: str) -> None:
    with pytest.raises(UserError, match=f"method.name = {name!r}: cannot be imported"):
        find.method(name)
    with pytest.raises(UserError, match=f"method.aggregate = {name!r}: cannot be imported"):
        aggregate.find(name)


MINE = '''
"""Somebody's own method and aggregator."""

from dataclasses import dataclass, replace

import torch

from fedtailor.core import Silo, in_silo
from fedtailor.methods.lora import Lora


@dataclass(frozen=True)
class Mine(Lora):
    """LoRA of rank 2 that also counts the rows of each silo first, in an exchange of its own."""

    rank: int = 2
    factor: float = 1.0

    def round(self, state, ask):
        counted = {reply.silo: reply.body.rows for reply in ask(count, HowMany("train"))}
        after = super().round(state, ask)
        return replace(after, notes={**after.notes, "rows": sum(counted.values()) * self.factor})


@dataclass(frozen=True)
class HowMany:
    split: str


@dataclass(frozen=True)
class Rows:
    rows: int


@in_silo
def count(silo: Silo, body: HowMany) -> Rows:
    silo.memory["asked"] = silo.memory.get("asked", 0) + 1
    return Rows(len(getattr(silo.data, body.split)))


def trimmed(replies):
    """Without the largest and the smallest of each number."""
    stacked = {n: torch.stack([d[n] for d, _ in replies]).sort(dim=0).values for n in replies[0][0]}
    return {n: t[1:-1].mean(dim=0) for n, t in stacked.items()}


def constant(replies):
    """Always the same step, so that its use can be told."""
    return {n: d * 0 + 0.25 for n, d in replies[0][0].items()}


NOT_A_METHOD = 3


class Plain:
    """Not a dataclass."""

    def round(self, state, ask): ...
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `mymethods.py`, from which the command is given."""
    (tmp_path / "mymethods.py").write_text(MINE)
    (tmp_path / "damaged.py").write_text("def (:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(wire, "ALLOWED", wire.ALLOWED)
    monkeypatch.delitem(sys.modules, "mymethods", raising=False)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("mymethods", None)
    progress.show(progress.Silent())


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def test_a_method_and_an_aggregator_from_one_file_outside_run_by_name_alone(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "tiny.jsonl").write_bytes(TINY.with_name("tiny.jsonl").read_bytes())
    named = 'name = "mymethods:Mine"\naggregate = "mymethods:trimmed"\nfactor = 0.5'
    (mine / "mine.toml").write_text(TINY.read_text().replace('name = "prefix"\nvirtual_tokens = 4', named))
    assert command("run", "mine.toml", "--set", 'rows=["federated"]') == 0, capsys.readouterr().err
    folder = mine / "runs" / "mine"
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"]["method"]["name"] == "mymethods:Mine"
    assert result["experiment"]["method"]["aggregate"] == "mymethods:trimmed"
    # rank 2 on two layers: queries 32 to 32, values 32 to 16
    assert result["rows"]["federated"]["trained_parameters"] == 2 * 2 * (32 + 32 + 32 + 16)
    silos = data.load(experiment.load(mine / "mine.toml").data, {}, 0).silos
    half = sum(len(silo.train) for silo in silos.values()) / 2
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [entry.get("rows") for entry in rounds] == [None, half, half]
    state = wire.read_file(folder / "rows" / "federated" / "state" / "generation.safetensors")
    assert len(state.memories) == len(silos), "what `count` remembers was kept"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert command("run", "--resume", str(folder)) == 0, "and gone on with"


def test_the_aggregator_named_is_the_one_that_is_used(mine: Path) -> None:
    settings = ["--set", 'rows=["federated"]', "--set", "method.aggregate=mymethods:constant"]
    assert command("run", str(TINY), *settings, "--out", "out") == 0
    rounds = [json.loads(line) for line in Path("out/rounds.jsonl").read_text().splitlines()]
    # 256 numbers, each changed by a quarter: the norm is sqrt(256) / 4
    assert [entry["delta_norm"] for entry in rounds[1:]] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("method.name=mymethods:Missing", "method.name = 'mymethods:Missing': cannot be imported"),
        ("method.name=mymethods:NOT_A_METHOD", "method.name = 'mymethods:NOT_A_METHOD'"),
        ("method.name=mymethods:trimmed", "method.name = 'mymethods:trimmed'"),
        ("method.name=mymethods:Plain", "method.name = 'mymethods:Plain'"),
        ("method.name=damaged:Mine", "method.name = 'damaged:Mine': cannot be imported"),
        ("method.aggregate=mymethods:NOT_A_METHOD", "method.aggregate = 'mymethods:NOT_A_METHOD'"),
        ("method.aggregate=mymethods:missing", "method.aggregate = 'mymethods:missing': cannot be imported"),
    ],
)
def test_a_name_that_is_no_method_is_one_clear_line(
    mine: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    settings = ["--set", "method.virtual_tokens=4"] if "aggregate" in setting else []
    code = command("check", str(TINY), "--set", setting, *settings)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len([line for line in lines if said in line]) == 1, lines
    assert not any("a bug" in line for line in lines)
