"""Floating point operations of a local step: counted as torch runs them, and estimated from sizes alone."""

from __future__ import annotations

import itertools
from typing import Any

from fedtailor import pieces, training
from fedtailor.data import Loaded
from fedtailor.experiment import Experiment, drawn
from fedtailor.methods.averaging import Averaging
from fedtailor.models import Resident

SILOS, STEPS = 3, 2  # that are counted: batches differ in length


def of(experiment: Experiment, loaded: Loaded, resident: Resident) -> dict[str, float]:
    """`measured_step`, `estimated_step`: operations (a multiply-add is two) of one local step of one silo, the mean over a few;
    `steps`: of the row `federated` in all. Empty for methods that do not train by local steps.

    Measured are matrix products as dispatched (`torch.utils.flop_counter`), those of attention too: it is computed from plain
    ones here, since the counter has no rule for a CPU's fused kernel. Estimated, for T places of a batch of rows L long, N
    weights in the base's matrices without its embeddings, n of them trained, and h wide layers: T (4 N + 2 n) for weights, since
    a frozen one needs no gradient, and 12 T L h a layer for attention (Kaplan et al. 2020, arXiv 2001.08361, count so; a
    backward pass costs two forward ones).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    method = experiment.method
    if not isinstance(method, Averaging) or resident.quantized:
        return {}
    tuned = method.put_on(resident, max(len(rows.labels) for rows in loaded.silos.values()))
    start = tuned.tensors()
    silos = list(itertools.islice(loaded.silos.values(), SILOS))
    how = method.local(method.lrs(1, max(experiment.rounds, 1))[:1] * STEPS)
    front = tuned.shift if tuned.prompted else 0
    batches = [
        piece
        for number, rows in enumerate(silos)
        for step in training.draw(resident, rows, how, number, tuned.shift)
        for batch in step
        for piece in pieces.parts(batch, resident.pad_id, resident.device)
    ]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for number, rows in enumerate(silos):
            training.train(resident, tuned, start, [(rows, number)], how, [{}])
    steps = len(silos) * STEPS
    guess = sum(_estimated(resident, batch, start, front) for batch in batches)
    whole = experiment.rounds * drawn(len(loaded.silos), experiment.participation) * method.local_steps
    return {
        "measured_step": counter.get_total_flops() / steps, "estimated_step": guess / steps, "steps": float(whole),
    }  # fmt: skip


def _estimated(resident: Resident, batch: Any, trained: dict[str, Any], front: int) -> float:
    """`front`: virtual tokens before each row, which pass through every layer as its own do."""
    config = resident.module.config
    matrices = sum(p.numel() for n, p in resident.module.named_parameters() if p.dim() == 2 and "embed" not in n)
    if resident.kind == "vision":
        length = (config.image_size // config.patch_size) ** 2
        places = length * batch.pixels.shape[0]
    else:
        length = batch.input_ids.shape[1] + front
        places = length * batch.input_ids.shape[0]
    if resident.kind == "causal":  # the output layer is the embeddings again, at the answers' places alone
        labels = batch.labels.numel() * config.vocab_size * config.hidden_size
    else:
        labels = 0
    mine = sum(t.numel() for n, t in trained.items() if t.dim() == 2 and "embed" not in n and not n.startswith("head"))
    attention = 12 * places * length * config.hidden_size * config.num_hidden_layers
    return float(places * (4 * matrices + 2 * min(mine, matrices)) + 4 * labels + attention)
