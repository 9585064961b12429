"""Which learning rate suits each method: where the defaults come from.

    python benchmarks/rates.py [--base minilm] [--methods lora prefix ...] [--seed 100] [--out runs/rates]

Federated over the four silos of the sentiment data (minilm: 8 rounds of 8 local steps of 8 rows, 100 validation rows a silo;
smollm2-135m: 4 rounds of 8 steps of 4 rows, 50 validation rows), other settings as they are by default. For each method the rate
starts at its default and goes up and down by a factor of 3 until the best loss on *validation* rows has a worse one on either
side; no test figure is used. One run each: differences below .03 nats are noise. What was run already is read from the folder,
so a stopped search goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

EXPERIMENT = """
name = "rates"
rounds = {rounds}
rows = ["federated"]
[model]
name = "{base}"
[data]
source = "sentiment"
template = {template}
label = "label"
labels = ["negative", "neutral", "positive"]
silo_column = "silo"
max_val = {val}
max_test = 1
[method]
name = "{method}"
lr = {lr}
batch_size = {rows}
[evaluate]
every = {rounds}
[engine]
threads = 1
"""
SIZES = {
    "minilm": {"template": '"{text}"', "rows": 8, "rounds": 8, "val": 100},
    "smollm2-135m": {"template": '"{text}\\nSentiment:"', "rows": 4, "rounds": 4, "val": 50},
}
FACTOR = 3.0


def main() -> None:
    from fedtailor import find

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(SIZES), default="minilm")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--sets", nargs="*", default=[], help="further settings, as method.optimizer_state=keep")
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    given = parser.parse_args()
    kind = "encoder" if given.base == "minilm" else "causal"
    names = given.methods or [n for n, m in find.methods().items() if kind in m.FOR and n != "peft"]
    print(f"{given.base}, seed {given.seed}, loss in nats on validation rows, accuracy in brackets {' '.join(given.sets)}")
    for name in names:
        begin = find.method(name)().lr
        tried = climbed(lambda lr, name=name: tried_once(given, name, lr), begin)  # type: ignore[misc]
        best = min(tried, key=lambda lr: tried[lr][0])
        told = ", ".join(f"{lr:.3g}: {loss:.3f} ({accuracy:.3f})" for lr, (loss, accuracy) in sorted(tried.items()))
        print(f"{name:>12}  best {best:.3g}  of {told}", flush=True)


def climbed(measure: Callable[[float], tuple[float, float]], begin: float) -> dict[float, tuple[float, float]]:
    """Loss and accuracy by rate, until the least loss lies between two others."""
    tried: dict[float, tuple[float, float]] = {}
    at = 0
    while True:
        for step in (at, at - 1, at + 1):
            lr = begin * FACTOR**step
            tried[lr] = tried.get(lr) or measure(lr)
        best = min((at - 1, at, at + 1), key=lambda step: tried[begin * FACTOR**step][0])
        if best == at:
            return tried
        at = best


def tried_once(given: argparse.Namespace, method: str, lr: float) -> tuple[float, float]:
    """Validation loss and accuracy, means over the silos, after the last round; infinity where training failed."""
    import fedtailor
    from fedtailor.errors import RunError

    mark = "_".join([given.base, method, f"{lr:.3g}", str(given.seed), *given.sets]).replace("/", "-")
    folder, note = given.out / mark, given.out / f"{mark}.json"
    if not note.exists():
        given.out.mkdir(parents=True, exist_ok=True)
        file = given.out / f"{mark}.toml"
        file.write_text(EXPERIMENT.format(base=given.base, method=method, lr=lr, **SIZES[given.base]))
        try:
            if folder.exists():
                fedtailor.run(resume=folder)
            else:
                fedtailor.run(file, sets=given.sets, seed=given.seed, out=folder)
            last = [json.loads(line) for line in next(folder.rglob("rounds.jsonl")).read_text().splitlines()][-1]["val"]
            found = [last["loss"]["mean"], last["accuracy"]["mean"]]
        except RunError as error:
            print(f"{mark}: {error}", flush=True)
            found = [math.inf, 0.0]
        note.write_text(json.dumps(found))
    loss, accuracy = json.loads(note.read_text())
    return float(loss), float(accuracy)


if __name__ == "__main__":
    main()
