"""Peak memory of a stretch of work, in megabytes (10^6 bytes)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset() -> bool:
    """Start a new stretch. False where the system cannot (not Linux): then the peak is that of the whole process.

    What is free already goes back to the system first, as far as it can: else a stretch would be told what an earlier one left.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other processes may share the card
        torch.cuda.reset_peak_memory_stats()
    try:
        CLEAR.write_text("5")  # resets the high-water mark of resident memory: proc(5)
    except OSError:
        return False
    return True


def megabytes() -> float:
    """Highest resident memory since `reset`, plus, with a GPU, the highest allocated there."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        resident = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak if sys.platform == "darwin" else peak * 1024
    return (resident + on_gpu) / 1e6
