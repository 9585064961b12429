"""Rows of several seeds as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedtailor.paired import over_seeds


def merge(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of several seeds as one: numbers are means; each metric also has `spread` (sd over seeds) and `by_seed`. Epsilon
    is that of all seeds together."""
    seeds = list(results)
    out: dict[str, Any] = {}
    for row in results[seeds[0]]:
        parts = [results[seed][row] for seed in seeds]
        out[row] = {
            key: _merged(key, [part[key] for part in parts], seeds) for key in parts[0] if all(key in p for p in parts)
        }
    return out


def _merged(key: str, values: list[Any], seeds: Sequence[int]) -> Any:
    if isinstance(values[0], dict) and "mean" in values[0]:
        means = [value["mean"] for value in values]
        held = [value["per_silo"] for value in values]  # a partition may leave a silo without test rows under some seed
        pooled = [value["pooled"] for value in values if "pooled" in value]
        return {
            "mean": statistics.fmean(means), "spread": statistics.stdev(means),
            "worst": statistics.fmean(value["worst"] for value in values),
            "per_silo": {s: statistics.fmean(by[s] for by in held if s in by) for one in held for s in one},
            "by_seed": {str(seed): mean for seed, mean in zip(seeds, means, strict=True)},
            **({"pooled": statistics.fmean(pooled), "pooled_spread": statistics.stdev(pooled),
                "pooled_by_seed": {str(seed): one for seed, one in zip(seeds, pooled, strict=True)}}
               if len(pooled) == len(values) else {}),
        }  # fmt: skip
    if key == "paired":
        rows = [row for row in values[0] if all(value.get(row) for value in values)]
        return {r: over_seeds({seed: value[r] for seed, value in zip(seeds, values, strict=True)}) for r in rows}
    if key == "own":
        shared = [name for name in values[0] if all(name in value for value in values)]
        return {name: _merged(name, [value[name] for value in values], seeds) for name in shared}
    if key == "rejected":
        return {why: sum(value.get(why, 0) for value in values) for value in values for why in value}
    if key == "epsilon":  # all seeds ask the same rows: what they tell adds up (of Gaussian noise that is an upper bound)
        return math.fsum(values)
    if key == "energy_how":
        return "; ".join(dict.fromkeys(values))
    if key == "peak_memory_mb":
        return max(values)
    if isinstance(values[0], int | float) and key not in ("trained_parameters", "rounds"):
        return statistics.fmean(values)
    return values[0]
