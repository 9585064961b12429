"""Energy of a stretch of work, in watt hours, by codecarbon where it is installed: nothing else is said to be a measure of it.

Where counters can be read (RAPL of the processor, NVML of a GPU) it is theirs, and so the whole package's, whoever uses it;
else the share of the processor's rated power that this process and its children used (of a processor that codecarbon does not
know, 4 W a thread). Memory's power is always estimated, from its size, and is most of what a small machine is said to use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RATED = "estimated from the processor's rated power and the memory's size"
MEASURED = "measured; memory estimated from its size"
COUNTED = ("CPU(Intel Rapl)", "CPU(Windows Emi)", "CPU(Intel Power Gadget)", "AppleSiliconChip", "Raspberry")


@contextlib.contextmanager
def metered() -> Iterator[dict[str, Any]]:
    """`with metered() as spent:`, and afterwards spent["energy_wh"] and spent["energy_how"]; empty without codecarbon, or where
    it fails. No file is written and nothing is sent."""
    spent: dict[str, Any] = {}
    tracker = _started()
    try:
        yield spent
    finally:
        if tracker is not None:
            with contextlib.suppress(Exception):  # a figure less is no reason to end a run
                tracker.stop()
                kwh = tracker.final_emissions_data.energy_consumed
                spent.update(energy_wh=1000 * kwh, energy_how=_how(tracker))


def total(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of parts that were metered, all of them, their sum, and how it was had; else nothing, as a part is not the whole."""
    if not parts or not all("energy_wh" in part for part in parts):
        return {}
    hows = dict.fromkeys(part["energy_how"] for part in parts)
    return {"energy_wh": math.fsum(part["energy_wh"] for part in parts), "energy_how": "; ".join(hows)}


def _started() -> Any:
    if importlib.util.find_spec("codecarbon") is None:
        return None
    with contextlib.suppress(Exception):
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads its own log_level
        tracker = OfflineEmissionsTracker(
            country_iso_code="USA",  # it wants one, for emissions, which are not asked; energy is the same anywhere
            tracking_mode="process", output_methods=[], log_level="critical", allow_multiple_runs=True,
            emissions_endpoint=None, electricitymaps_api_token=None,  # whatever its own file says: nothing is sent
        )  # fmt: skip
        tracker.start()
        return tracker
    return None


def _how(tracker: Any) -> str:
    """What its parts say of themselves, such as CPU(Intel Rapl)."""
    parts = [part for part in tracker._conf["hardware"] if not part.startswith("RAM")]
    if all(part.startswith(("GPU", *COUNTED)) for part in parts):
        return MEASURED
    return f"GPU measured, the rest {RATED}" if any(part.startswith("GPU") for part in parts) else RATED
