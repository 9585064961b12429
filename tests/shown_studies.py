"""A study that has everything a page may meet: eight methods, long and hostile names, one seed, what is not finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import studies
from fedtailor.study.grid import Study
from fedtailor.study.measured import Found

METHODS = ("prefix", "lora", "full", "ia3", "prompt", "adapter", "a_method_with_a_name_that_is_rather_long", "ensemble")
HOSTILE = '$x_1$ <b>"silo"</b> & a --> \u202e\x07 <script>alert(1)</script>'
LONG = "how the rows of every single silo were collected and labelled by hand"
ATTACKS = ("sign_flip", "gaussian_noise", "label_flip", "scaled_replacement", "little_is_enough")
ALL = ("zero_shot", "alone", "federated", "centralized")
GAIN = {"zero_shot": -0.3, "alone": -0.1, "federated": 0.0, "centralized": 0.02}


def everything() -> tuple[Study, list[Found]]:
    """A study with all kinds of charts, and its figures."""
    parts = [
        {"name": "methods", "asks": "performance", "rows": ALL, "axes": {"method": METHODS}, "about": HOSTILE},
        {"name": "cost", "asks": "efficiency", "rows": ALL, "axes": {"method": METHODS}},
        {"name": "skew", "axes": {"method": METHODS[:4], "alpha": [0.01, 0.1, 1.0, 100.0]}, "title": "Label skew"},
        {"name": "attacks", "axes": {"aggregate": METHODS[:7], "attack": ATTACKS, "attackers": [0, 1, 2]}},
        {"name": "names", "axes": {"method": METHODS[:2], LONG: [HOSTILE, "w" * 60, "plain"]}},
        {"name": "once", "axes": {"dropout": [0.0, 0.1, 0.5]}, "seeds": [0]},
    ]
    choice: dict[str, Any] = {}
    for axis, values in (("method", METHODS), ("aggregate", METHODS[:7]), ("attack", ATTACKS), ("attackers", (0, 1, 2)),
                         (LONG, (HOSTILE, "w" * 60, "plain"))):  # fmt: skip
        choice |= studies.nothing(axis, *values)
    one = studies.study(*parts, choice=choice, title="Everything at once", margin=0.02)
    return one, studies.found(one, _figures)


def _figures(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any] | None:
    if {"ia3", 0.1} <= set(at.values()) or {"label_flip", 2} <= set(at.values()):
        return None  # not finished
    place = METHODS.index(at["method"]) if at.get("method") in METHODS else METHODS.index(at.get("aggregate", "lora"))
    quality = 0.8 + 0.01 * place - 0.03 * at.get("attackers", 0) + 0.004 * (seed - 1) + GAIN[row]
    moved = 4e4 * 3.0**place if row == "federated" else 0.0
    rounds = studies.logged(*((moved / 10, 2.0, quality - 0.3 / (number + 1)) for number in range(6))) if moved else []
    return {
        **studies.accuracy(quality), "bytes_up": 0.6 * moved, "bytes_down": 0.6 * moved, "seconds": 30.0 + 20 * place,
        "peak_memory_mb": 900.0, "trained_parameters": 1000, "rounds": rounds,
    }  # fmt: skip
