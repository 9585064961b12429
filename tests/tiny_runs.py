"""What tests of whole runs share: the tiny experiment, asked and conducted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtailor import experiment, find, runs
from fedtailor.data import Row, SiloData
from fedtailor.experiment import Experiment

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


ONE_THREAD = "engine.threads=1"


FEDERATED = 'rows=["federated"]'


PUBLIC = SiloData(
    tuple(
        Row(f"The {thing} was {how}.\nSentiment:", answer, f"{thing}-{how}")
        for thing in ("lamp", "green boat", "road to the sea")
        for how, answer in (("dull", "bad"), ("lovely", "good"))
    ),
    (), (), ("bad", "good"),
)  # fmt: skip
"""What a server may hold for methods that ask about public rows."""


def kept(sets: Sequence[str]) -> list[str]:
    """Moments kept between rounds, where the method of these sets has any."""
    name = next((text.partition("=")[2] for text in sets if text.startswith("method.name=")), "prefix")
    return ["method.optimizer_state=keep"] if hasattr(find.method(name), "optimizer_state") else []


def asked(*sets: str) -> Experiment:
    return experiment.load(TINY, [ONE_THREAD, "engine.cohort=1", *sets])


def conduct(folder: Path, *sets: str) -> dict[str, Any]:
    return runs.begin(asked(*sets), folder, "a test").conduct()
