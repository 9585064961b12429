"""What tests of studies share: a small one on the tiny experiment."""

from __future__ import annotations

from typing import Any

from fedtailor.study import grid
from fedtailor.study.grid import Study
from tiny_runs import TINY

ENGINE = {"engine.threads": 1, "engine.cohort": 1}


def a_study(*parts: dict[str, Any], seeds: tuple[int, ...] = (0, 1), **more: Any) -> Study:
    laid = [{**part, "set": {**ENGINE, **part.get("set", {})}} for part in parts]
    return grid.parse({"base": str(TINY), "part": laid, "seeds": list(seeds), "name": "small", **more}, "small.toml")


LOST = {"name": "lost", "axes": {"method": ["prefix"], "dropout": [0.0, 0.2]}}
CLOSE = {"name": "close", "asks": "performance", "axes": {"method": ["prefix", "lora"]}, "rows": ["federated", "centralized"]}
