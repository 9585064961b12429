"""Energy of trained rows: codecarbon for real where it is installed, and what is made of its figures."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedtailor import energy, runs
from fedtailor.figures import cost_of
from tiny_runs import FEDERATED, conduct


class Meter:
    """What `metered` uses of a codecarbon tracker: 2 Wh each time, by these parts."""

    final_emissions_data = SimpleNamespace(energy_consumed=0.002)

    def __init__(self, *parts: str) -> None:
        self._conf = {"hardware": ["RAM()", *parts]}

    def stop(self) -> None:
        pass


def metering(monkeypatch: pytest.MonkeyPatch, one: Any) -> None:
    monkeypatch.setattr(energy, "_started", lambda: one)


def test_codecarbon_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A second's work costs something, more than no time; nothing is written, sent, said, or left running."""
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was made"))
    with energy.metered() as nothing:
        pass
    threads = threading.active_count()
    with energy.metered() as spent:
        until, values = time.monotonic() + 1, torch.randn(200, 200)
        while time.monotonic() < until:
            values @ values
    assert spent["energy_wh"] > nothing["energy_wh"] >= 0
    assert spent["energy_how"] in (energy.RATED, energy.MEASURED, f"GPU measured, the rest {energy.RATED}")
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("parts", "how"),
    [
        (["CPU(Cpu Load)"], energy.RATED),
        (["CPU(AMD EPYC > 85W)"], energy.RATED),
        (["CPU(Intel Rapl)"], energy.MEASURED),
        (["CPU(Intel Rapl)", "GPU() (NVIDIA H100)"], energy.MEASURED),
        (["AppleSiliconChip (Apple M4 > CPU)", "AppleSiliconChip (Apple M4 > GPU)"], energy.MEASURED),
        (["CPU(Cpu Load)", "GPU() (NVIDIA H100)"], f"GPU measured, the rest {energy.RATED}"),
    ],
)
def test_how_it_was_had(parts: list[str], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metering(monkeypatch, Meter(*parts))
    with energy.metered() as spent:
        pass
    assert spent == {"energy_wh": 2.0, "energy_how": how}


def test_a_meter_that_fails_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    metering(monkeypatch, SimpleNamespace(stop=lambda: 1 / 0))
    with energy.metered() as spent:
        pass
    assert spent == {}


def test_a_sum_is_of_all_parts_or_of_none() -> None:
    one, other = {"energy_wh": 1.5, "energy_how": "measured"}, {"energy_wh": 0.5, "energy_how": "estimated"}
    assert energy.total([one, other, one]) == {"energy_wh": 3.5, "energy_how": "measured; estimated"}
    assert energy.total([one, {}]) == {}
    assert energy.total([]) == {}


def test_trained_rows_have_the_energy_of_their_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metering(monkeypatch, Meter("CPU(Intel Rapl)"))
    rows = conduct(tmp_path, 'rows=["zero_shot", "federated", "alone"]')["rows"]
    assert "energy_wh" not in rows["zero_shot"]
    assert (rows["federated"]["energy_wh"], rows["alone"]["energy_wh"]) == (2 * 2.0, 3 * 2 * 2.0), "two rounds; three silos"
    assert rows["alone"]["energy_how"] == energy.MEASURED


def test_without_codecarbon_there_is_none_and_a_run_gone_on_without_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metering(monkeypatch, Meter("CPU(Intel Rapl)"))

    rounds = iter([1])

    def second_is_cut(*_: object) -> bool:
        if next(rounds, None) is None:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr("fedtailor.experiment._improved", second_is_cut)
    with pytest.raises(KeyboardInterrupt):
        conduct(tmp_path, FEDERATED)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    row = runs.resume(tmp_path).conduct()["rows"]["federated"]
    log = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert ["energy_wh" in entry for entry in log] == [False, True, False]
    assert not {"energy_wh", "energy_how"} & set(row)


def test_energy_is_shown_in_a_fitting_unit() -> None:
    shown = [cost_of("energy_wh").show(wh) for wh in (0.0123, 12.3, 12300, None)]
    assert shown == ["12.3 mWh", "12.3 Wh", "12.3 kWh", "\N{EN DASH}"]
