"""What `check` and `methods` print: rows, and every tensor and byte that would leave a silo."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtailor import find, wire
from fedtailor.checking import list_methods, show
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment, load, parse
from fedtailor.methods.averaging import Train, train
from fedtailor.models import Base, Resident
from fedtailor.models import load as load_model

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def printed(what: Any, *args: Any) -> str:
    out = Console(file=io.StringIO(), width=200)
    what(*args, out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


def words(line: str) -> list[str]:
    return line.replace("│", " ").replace("┃", " ").split()


@pytest.fixture
def experiment() -> Experiment:
    return load(TINY)


def test_rows_of_every_silo(experiment: Experiment) -> None:
    from fedtailor import data

    lines = [words(line) for line in printed(show, experiment).splitlines()]
    for name, rows in data.load(experiment.data, {}, 0).silos.items():
        assert [name, *(str(len(part)) for part in (rows.train, rows.val, rows.test)), "0"] in lines


@pytest.mark.parametrize("method", ["prefix", "lora", "full"])
def test_tensors_and_bytes_are_those_that_a_round_sends(method: str) -> None:
    from fedtailor import data

    experiment = replace(load(TINY), method=find.method(method)(local_steps=1, batch_size=2), participation=0.5)
    text = printed(show, experiment)
    resident = load_model(experiment.model)
    silos = data.load(experiment.data, {}, 0).silos
    sent: list[bytes] = []
    engine = InProcess(silos, {"base": resident}, record=lambda _, way, body: sent.append(body) if way == "up" else None)
    state = experiment.method.begin(engine.reach(0))
    sent.clear()
    list(engine.reach(1)(train, Train(experiment.method, state.tensors, (0.01,)), to=list(silos)[:1]))
    names = {word for line in text.splitlines() for word in words(line)}
    for name, shape, dtype in wire.leaving(wire.unpack(sent[0])):
        assert name in names
        assert any(words(line) == [name, *" x ".join(map(str, shape)).split(), dtype] for line in text.splitlines())
    size, count = wire_size(experiment, resident)
    assert abs(size - len(sent[0])) <= 8  # a digit more or less of the loss, padded to 8 bytes
    half = max(1, round(len(silos) / 2))
    assert f"{count:,} numbers, about {size:,} bytes up per silo and round; {half} of {len(silos)} silos a round" in text
    assert f"{experiment.rounds} rounds: {size * half * experiment.rounds:,} bytes up in all" in text


def test_both_turns_of_a_method_are_listed() -> None:
    """B leaves in odd rounds, A in even ones: all are named; three rounds cost two of the one, one of the other."""
    from fedtailor import data

    experiment = load(TINY, ["method.name=lora", "method.combine=alternate", "method.local_steps=1", "rounds=3"])
    text = printed(show, experiment)
    assert ".lora_A." in text
    assert ".lora_B." in text
    sent: list[int] = []
    silos = data.load(experiment.data, {}, 0).silos
    engine = InProcess(
        silos, {"base": load_model(experiment.model)}, rounds=3,
        record=lambda _, way, body: sent.append(len(body)) if way == "up" else None,
    )  # fmt: skip
    state = experiment.method.begin(engine.reach(0))
    sent.clear()
    for number in (1, 2, 3):
        state = experiment.method.round(state, engine.reach(number))
    told = int(re.findall(r"3 rounds: ([\d,]+) bytes up in all", text)[0].replace(",", ""))
    assert abs(told - sum(sent)) <= 8 * len(sent)


def wire_size(experiment: Experiment, resident: Resident) -> tuple[int, int]:
    body = experiment.method.example(resident, 2)
    return len(wire.pack(body)), sum(t.numel() for t in body.delta.values())


def test_check_refuses_a_prefix_without_room(tmp_path: Path) -> None:
    experiment = load(TINY, ["method.virtual_tokens=600"])
    with pytest.raises(UserError, match="virtual_tokens = 600 leaves no room"):
        show(experiment, Console(file=io.StringIO()))


def test_check_says_who_has_the_long_row(tmp_path: Path) -> None:
    rows = [{"x": f"{i} short", "y": "z", "who": "one" if i % 2 else "two"} for i in range(40)]
    rows[0]["x"] = "long " * 200
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table: Mapping[str, Any] = {
        "name": "long", "model": {"name": "tiny", "dtype": "float32"}, "method": {"name": "lora"},
        "data": {"source": str(tmp_path / "rows.jsonl"), "template": "{x}", "answer": "y", "silo_column": "who"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"silo 'two', \w+, row \w+: a row has 10\d\d tokens"):
        show(parse(table, "here"), Console(file=io.StringIO()))


def test_an_unknown_model_is_told_before_anything_else(experiment: Experiment) -> None:
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        show(replace(experiment, model=Base("tinny")), Console(file=io.StringIO()))


def test_methods_are_listed_with_what_is_their_own() -> None:
    text = printed(lambda out: list_methods(out, "tiny"))
    for name in find.methods():
        assert name in text
    assert "virtual_tokens = 16" in text
    assert "rank = 8" in text
    assert "1,024" in text, "numbers of a prefix: 16 virtual tokens x 2 layers x keys and values x 16"
    assert "head needs an encoder" in text
    assert "lr = 0.01" in text, "prefix has a default of its own"
    table, _, shared = text.partition("Settings of all of them: ")
    assert "server_optimizer = 'none'" in shared
    assert "server_optimizer" not in table
