"""How figures and names are shown: numbers, bytes, seconds, the words for metrics, rows and costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Metric:
    label: str
    better: str = ""  # "higher", "lower", or "" where it is not known

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓"}.get(self.better, "")


# Columns and lines stand in this order; what is not here comes after, under its own name. The page says what they mean.
METRICS = {
    "accuracy": Metric("accuracy", "higher"), "macro_f1": Metric("macro F1", "higher"),
    "recall_at_5": Metric("recall@5", "higher"), "mrr": Metric("MRR", "higher"), "token_f1": Metric("token F1", "higher"),
    "rouge_l": Metric("ROUGE-L", "higher"), "bleu": Metric("BLEU", "higher"), "exact_match": Metric("exact match", "higher"),
    "silos_asked": Metric("silos asked", "lower"), "loss": Metric("loss", "lower"),
    "attack_success": Metric("attack success", "lower"),
    "gap": Metric("exactness gap of the aggregation", "lower"),
}
ROWS = {"zero_shot": "zero-shot", "few_shot": "few-shot", "alone": "alone", "alone.own": "alone, own",
        "hand_written": "best hand-written prompt", "federated": "federated",
        "federated.own": "federated, own models", "noiseless": "federated, without noise",
        "untrained": "federated, retriever as it comes", "routed": "federated, routed",
        "centralized": "centralized"}


def number(value: Any) -> str:
    """Three decimals, or one from 10 upwards (BLEU in per cent, a perplexity)."""
    if not is_number(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def size(count: Any) -> str:
    """Bytes in powers of 1000."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    value, unit = (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
    return f"{value:,.{int(value < 9.95)}f} {unit}"


def _scaled(count: Any, units: Sequence[str]) -> str:
    if not is_number(count):
        return MISSING
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:,.{1 if power and abs(count) < 99.95 else 0}f}{units[power]}"


@dataclass(frozen=True)
class Cost:
    label: str
    show: Callable[[Any], str] = number
    unit: str = ""  # of the exact value


COSTS = {
    "bytes_up": Cost("up", size, "bytes"),
    "bytes_down": Cost("down", size, "bytes"),
    "seconds": Cost("time", duration, "seconds"),
    "energy_wh": Cost("energy", lambda wh: _scaled(wh * 1e6 if is_number(wh) else wh, (" µWh", " mWh", " Wh", " kWh")), "Wh"),
    "peak_memory_mb": Cost("memory", lambda mb: size(mb * 1e6) if is_number(mb) else MISSING, "MB"),
    "model_calls": Cost("calls", lambda count: _scaled(count, ("", " k", " M", " G")), "rows scored under one prompt"),
    "epsilon": Cost("epsilon", number, "over all seeds"),
    "public_distance": Cost("distance of public rows", unit="of 1, Jensen-Shannon divergence of their tokens from the silos'"),
    "declined_share": Cost("share declined", unit="of public rows, which silos hold themselves"),
    "waited": Cost("waited", number, "times of a usual silo's time, over all rounds"),
    "trained_parameters": Cost("params", lambda count: _scaled(count, ("", " k", " M", " G")), "parameters"),
}


def metric_of(name: str) -> Metric:
    return METRICS.get(name) or Metric(words(name))


def cost_of(name: str) -> Cost:
    return COSTS.get(name) or Cost(words(name))


def words(name: str) -> str:
    return clean(name).replace("_", " ")


def with_spread(metric: Mapping[str, Any]) -> str:
    """The mean, and ± its standard deviation over the seeds where there are several."""
    spread = metric.get("spread")
    return number(metric.get("mean")) + (f" ±{number(spread)}" if is_number(spread) else "")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def clean(value: Any) -> str:
    """Without control characters: they upset terminals, have no place in HTML, or turn the direction of text."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))
