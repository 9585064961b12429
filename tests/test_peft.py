"""Any PEFT kind: those that cannot be computed for many silos in one pass go one by one, and the run says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtailor import wire
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.methods import peft
from fedtailor.methods.peft import Peft
from fedtailor.models import Resident
from tiny_runs import conduct

OFT = Peft(type="oft", settings={"oft_block_size": 8}, local_steps=2, batch_size=2)


def trained(resident: Resident, data: dict[str, SiloData], cohort: int) -> Any:
    engine = InProcess(data, {"base": resident}, rounds=1, cohort=cohort)
    return OFT.round(OFT.begin(engine.reach(0)), engine.reach(1))


def test_what_is_known_goes_one_by_one(llama: Resident) -> None:
    assert OFT.one_by_one == "oft is not to be computed under torch.func.vmap"
    assert Peft().one_by_one == ""
    assert OFT.put_on(llama, 0).alone == OFT.one_by_one


def test_what_is_not_known_is_tried_before_it_counts(
    llama: Resident, rated: dict[str, SiloData], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wire.pack(trained(llama, rated, 1))
    monkeypatch.setattr(peft, "ALONE", frozenset())
    llama.tuned()  # off, so that it is tried anew
    assert "torch.func.vmap" in OFT.put_on(llama, 0).alone
    assert wire.pack(trained(llama, rated, 3)) == expected
    llama.tuned()


def test_the_run_says_so(tmp_path: Path) -> None:
    conduct(tmp_path / "run", "method.name=peft", "method.type=oft", "method.settings={oft_block_size = 8}", "engine.cohort=3")
    environment = json.loads((tmp_path / "run" / "result.json").read_text())["environment"]
    assert environment["cohort"] == 1
    assert environment["cohort_note"] == "silos trained one by one: oft is not to be computed under torch.func.vmap"
    assert "silos trained one by one" in report_of(tmp_path / "run")
    conduct(tmp_path / "other", "method.name=lora")
    assert "cohort_note" not in json.loads((tmp_path / "other" / "result.json").read_text())["environment"]


def report_of(folder: Path) -> str:
    from fedtailor import report

    return report.write(folder).read_text()
