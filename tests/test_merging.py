"""Rows of several seeds as one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedtailor.merging import merge


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
    assert "pooled" not in merged["accuracy"]
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


def test_what_is_over_all_rows_is_merged_too() -> None:
    parts = [row((0.5, 0.7)), row((0.5, 0.7))]
    for part, pooled in zip(parts, (0.6, 0.8), strict=True):
        part["accuracy"]["pooled"] = pooled
    merged = merge(dict(enumerate({"federated": part} for part in parts)))["federated"]["accuracy"]
    assert (merged["pooled"], merged["pooled_spread"]) == pytest.approx((0.7, math.sqrt(0.02)))
    assert merged["pooled_by_seed"] == {"0": 0.6, "1": 0.8}


def test_own_figures_are_merged_too() -> None:
    own = {"accuracy": row((0.2, 0.4))["accuracy"]}, {"accuracy": row((0.6, 0.8))["accuracy"]}
    merged = merge({i: {"alone": row((0.5, 0.5), own=part)} for i, part in enumerate(own)})["alone"]["own"]
    assert merged["accuracy"]["mean"] == pytest.approx(0.5)
    assert merged["accuracy"]["per_silo"] == pytest.approx({"a": 0.4, "b": 0.6})


def test_what_several_seeds_spent_adds_up() -> None:
    parts = {seed: {"federated": {"epsilon": epsilon}} for seed, epsilon in ((0, 2.0), (1, 3.5))}
    assert merge(parts)["federated"]["epsilon"] == 5.5


def test_energy_is_a_mean_and_each_way_it_was_had_is_named() -> None:
    hows = {0: "measured", 1: "estimated", 2: "measured"}
    merged = merge({s: {"alone": {"energy_wh": 1.0 + s, "energy_how": how}} for s, how in hows.items()})["alone"]
    assert merged == {"energy_wh": 2.0, "energy_how": "measured; estimated"}
