"""What cutting a step's rows into pieces, and plain attention for short rows, save on a CPU: side by side, in one run.

    python benchmarks/steps.py            # MiniLM, prefix-tuning and LoRA, rows of experiments/skew.toml; some minutes

Two steps are timed, each over as many different rows: the cohort step of twenty silos with four rows each, and the plain
step of one silo with eighty. Told: seconds of each way (the median over repeats, taken in turn) and how many times as long
as the first it takes. The gradients of all ways are the same but for rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedtailor import data, experiment, models, pieces, training
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.training import Local

FILE = Path(__file__).resolve().parents[1] / "experiments" / "skew.toml"
WAYS = {  # PLACES, SHORT
    "as it is": (pieces.PLACES, training.SHORT),
    "without pieces": (10**9, training.SHORT),
    "with fused attention": (pieces.PLACES, 0),  # of the plain step: the cohort step has plain attention in any case
    "without either": (10**9, 0),
}


def steps(method: Averaging, base: models.Resident, loaded: data.Loaded, count: int) -> dict[str, list[Callable[[], None]]]:
    """`count` steps of either kind, each of rows of its own."""
    silos = list(loaded.silos.values())
    tuned = method.put_on(base, len(silos[0].labels))
    start = method.initial(base, tuned, 0)
    one, all_of_them = ({n: t.expand(s, *t.shape).clone() for n, t in start.items()} for s in (1, len(silos)))
    found: dict[str, list[Callable[[], None]]] = {"cohort": [], "plain": []}
    for seed in range(count):
        few = [training.draw(base, silo, Local((0.1,), batch_size=80 // len(silos)), seed, tuned.shift)[0][0] for silo in silos]
        many = training.draw(base, silos[0], Local((0.1,), batch_size=80), seed, tuned.shift)[0][0]
        found["cohort"].append(lambda few=few: training._cohort(tuned, all_of_them, {}, few, base, None))
        found["plain"].append(lambda many=many: training._plain(tuned, one, {}, [many], base, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    settings = experiment.load(FILE)
    base, loaded = models.load(settings.model), data.load(settings.data, {}, 0)
    for method in (Prefix(), Lora()):
        for kind, taken in steps(method, base, loaded, asked.steps).items():
            spent: dict[str, list[float]] = {way: [] for way in WAYS}
            for repeat in range(asked.repeats + 1):
                for way, (pieces.PLACES, training.SHORT) in WAYS.items():
                    began = time.perf_counter()
                    for step in taken:
                        step()
                    if repeat:  # the first prepares products of every shape
                        spent[way].append((time.perf_counter() - began) / asked.steps)
            first = statistics.median(spent["as it is"])
            told = ", ".join(f"{way} {(s := statistics.median(each)):.2f} s ({s / first:.2f})" for way, each in spent.items())
            print(f"{type(method).__name__.lower()}, {kind} step of 80 rows: {told}", flush=True)


if __name__ == "__main__":
    main()
