"""What federation costs: a federated round beside a bare centralized loop of the same method, precision and rows.

    python benchmarks/overhead.py [--model smollm2-135m] [--method prefix] [--silos 4 64] [--repeats 3]

4 silos take 8 local steps each, 64 take one: the first is the usual round, the second the dearest in exchanges.

Prints tokens per second and peak memory of both, and their ratios. The bare loop is what one would write by hand with
plain PEFT and torch.optim on the very batches that the silos draw (logits only where there are labels, as we do).
Each measurement runs in a process of its own, alternating, and the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

BATCH = 8  # rows per step
ROWS = 64  # training rows of each silo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="prefix")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--silos", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=["federated", "bare"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given)))
        return
    print(f"{given.method} on {given.model}, steps of {BATCH} rows, best of {given.repeats}")
    print(f"{'silos':>5} {'':>10} {'tokens/s':>9} {'peak MB':>8}")
    for silos in given.silos:
        found: dict[str, dict[str, float]] = {}
        for _ in range(given.repeats):
            for kind in ("bare", "federated"):
                now = in_process_of_its_own(kind, given, silos)
                old = found.get(kind, now)
                found[kind] = {
                    "speed": max(now["speed"], old["speed"]),
                    "peak": min(now["peak"], old["peak"]),
                    "tokens": now["tokens"],
                }
        assert found["bare"]["tokens"] == found["federated"]["tokens"], "both must see the same tokens"
        for kind, best in found.items():
            print(f"{silos:>5} {kind:>10} {best['speed']:>9.0f} {best['peak']:>8.0f}")
        speed, peak = (found["federated"][k] / found["bare"][k] for k in ("speed", "peak"))
        print(f"{silos:>5} {'ratio':>10} {speed:>9.3f} {peak:>8.3f}", flush=True)


def in_process_of_its_own(kind: str, given: argparse.Namespace, silos: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", kind, "--model", given.model, "--method", given.method]
    command += ["--dtype", given.dtype, "--silos", str(silos)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """One process: load, warm up, then measure one pass over the work of one round."""
    from fedtailor import find, models, peak
    from fedtailor.data import SiloData
    from fedtailor.engines.in_process import InProcess

    resident = models.load(models.Base(given.model, given.dtype))
    method = find.method(given.method)(local_steps=max(1, 32 // given.silos[0]), batch_size=BATCH)
    data = {f"silo_{i:02d}": SiloData(rows(i), (), (), ("negative", "neutral", "positive")) for i in range(given.silos[0])}
    engine = InProcess(data, {"base": resident}, rounds=2, cohort="auto")
    state = method.begin(engine.reach(0))
    engine.commit()
    batches = drawn(resident, method, data)
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    loop = Bare(resident, method, state.tensors) if kind == "bare" else None
    peak.reset()
    if loop is not None:
        loop.run(batches[:4])
        began = time.perf_counter()
        loop.run(batches)
    else:
        method.round(state, engine.reach(2, list(data)[:4]))  # warm up; the cohort is measured here, too
        engine.commit()
        began = time.perf_counter()
        method.round(state, engine.reach(1))
    return {"speed": tokens / (time.perf_counter() - began), "peak": peak.megabytes(), "tokens": tokens}


def rows(i: int) -> tuple[Any, ...]:
    """Made-up reviews of 10 to 50 words."""
    import random

    from fedtailor.data import Row

    dice = random.Random(i)
    words = ["the", "film", "was", "very", "good", "bad", "long", "and", "but", "not", "story", "music", "scene", "slow"]
    texts = [" ".join(dice.choices(words, k=dice.randint(10, 50))) for _ in range(ROWS)]
    labels = ["negative", "neutral", "positive"]
    return tuple(Row(f"{text}\nSentiment:", dice.choice(labels), str(n)) for n, text in enumerate(texts))


def drawn(resident: Any, method: Any, data: Any) -> list[Any]:
    """The batches that the silos draw in round 1, in silo order."""
    from fedtailor import training
    from fedtailor.engines.desk import seed_of

    how = method.local(method.lrs(1, 2))
    # ask 0 of round 1 is the training ask
    each = [training.draw(resident, rows, how, seed_of(0, name, 1, 0)) for name, rows in data.items()]
    return [batch for silo in each for step in silo for batch in step]


class Bare:
    """The loop one would write by hand: a PEFT model, torch.optim.AdamW, gradient clipping."""

    def __init__(self, resident: Any, method: Any, tensors: Any) -> None:
        import torch

        self.torch, self.resident = torch, resident
        self.tuned = method.put_on(resident, 0)
        self.model = self.tuned.inner
        parameters = dict(self.model.named_parameters())
        self.trained = [parameters[name] for name in tensors]
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
        for p in self.trained:
            p.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.trained, lr=method.lr, weight_decay=0.0)

    def run(self, batches: list[Any]) -> None:
        torch = self.torch
        for batch in batches:
            batch = batch.to(self.resident.device)
            keep = batch.labels.shape[1] + 1
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=keep, use_cache=False
            ).logits
            told, wanted = logits[:, :-1].flatten(0, 1).float(), batch.labels.flatten()
            loss = torch.nn.functional.cross_entropy(told, wanted, ignore_index=-100)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            loss.item()


if __name__ == "__main__":
    main()
