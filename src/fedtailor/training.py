"""Local training: our own small loop. One silo by the plain step, or S silos in one pass by the cohort step.

Every tensor here has a silo axis in front: (S, ...), S = 1 for one silo. Optimizers are elementwise, so one serves all
silos; what is not elementwise (gradients, the norm to clip) is computed per silo.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtailor import pieces, progress
from fedtailor.answering import trainable
from fedtailor.data import SiloData
from fedtailor.errors import SiloError
from fedtailor.models import Resident
from fedtailor.tuned import Batch, Tensors, Tuned, joined, stack

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Tokens of a row up to which attention in bf16 is plain matrix products on a CPU: the fused kernel's way back takes three
# times as long for 24 or 64 of them, and less from 256 on. In fp32 both are alike for short rows.
SHORT = 128


@dataclass(frozen=True)
class Local:
    """How a silo trains between two exchanges."""

    lrs: tuple[float, ...]  # learning rate of each local step: its length is the number of steps
    batch_size: int = 8  # rows of one pass
    accumulate: int = 1  # passes of one optimizer step
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0  # decoupled (Loshchilov & Hutter 2019)
    clip: float = 1.0  # largest gradient norm of one silo's step; 0: no clipping
    prox: float = 0.0  # FedProx's mu (Li et al. 2020): pulls towards the round's start
    dropout: bool = False  # the adapter has dropout: masks from the silo's seed, plain step only


@dataclass
class Outcome:
    """What local training leaves behind, each with a silo axis."""

    tensors: Tensors
    moments: Tensors  # the optimizer's own state: "step/<name>", "m/<name>", "v/<name>"
    loss: list[float]  # mean nats per label place over the steps, as trained (before each update)
    places: list[int]
    failed: list[str | None]  # why this silo's result must not be used
    gradient: Tensors  # mean over the steps, before clipping and drift; only where there is drift


def draw(resident: Resident, data: SiloData, how: Local, seed: int, taken: int = 0) -> list[list[Batch]]:
    """The batches of all local steps: steps x accumulate, each of `batch_size` rows.

    Rows are drawn without replacement until the silo has no more, then anew. Rows of like length share a batch (little
    padding); the order of batches is drawn too. `taken`: places of the context that are a prefix's.
    """
    dice = torch.Generator().manual_seed(seed % 2**63)
    passes = len(how.lrs) * how.accumulate
    wanted, rows = passes * how.batch_size, data.train
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(len(rows), generator=dice).tolist()
    chosen = [rows[i] for i in order[:wanted]]
    items, make = trainable(resident, chosen, data.labels, taken)
    items = sorted(items, key=len)
    batches = [make(items[i : i + how.batch_size]) for i in range(0, wanted, how.batch_size)]
    batches = [batches[i] for i in torch.randperm(passes, generator=dice).tolist()]
    return [batches[i : i + how.accumulate] for i in range(0, passes, how.accumulate)]


def train(
    resident: Resident,
    tuned: Tuned,
    start: Mapping[str, Tensor],
    silos: Sequence[tuple[SiloData, int]],
    how: Local,
    moments: Sequence[Mapping[str, Tensor]],
    fixed: Mapping[str, Tensor] | None = None,
    drift: Sequence[Mapping[str, Tensor]] = (),
    neutral: Mapping[str, Tensor] | None = None,
    drawn: Sequence[Sequence[Sequence[Any]]] | None = None,
) -> Outcome:
    """`len(how.lrs)` steps for each of the silos (rows, seed) from the same start. `moments`: one per silo, may be empty.

    `fixed`: tensors that are used and not trained (`tuned.joined`). `drift`: one per silo, added to each of its gradients
    (SCAFFOLD); then the mean gradient is in the outcome. `neutral`: what weight decay pulls to; 0 where nothing is said.

    `drawn`: for each silo the batches of its steps, in place of `draw`'s; then `tuned` may be whatever has their `losses`.

    One silo takes the plain step; several take the cohort step. A silo whose loss stops being finite is named in
    `failed`; the others are not touched by it.
    """
    count = len(silos)
    device = resident.device
    tensors = {
        n: t.to(device).expand(count, *t.shape).clone(memory_format=torch.contiguous_format) for n, t in start.items()
    }
    anchor = {n: t.to(device) for n, t in start.items()} if how.prox else {}
    state = _moments(tensors, moments, how)
    drawn = [draw(resident, data, how, seed, tuned.shift) for data, seed in silos] if drawn is None else drawn
    gradient = _plain if count == 1 else _cohort
    still = {n: t.to(device) for n, t in (fixed or {}).items()}
    calm = {n: t.to(device) for n, t in (neutral or {}).items()}
    drifts = {n: torch.stack([one[n].to(device) for one in drift]) for n in start} if drift else {}
    mean_gradient: Tensors = {}
    total, places = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    failed: list[str | None] = [None] * count
    with progress.bar("local steps", len(how.lrs)) as advance:
        for step, lr in enumerate(how.lrs):
            grads: Tensors = {}
            nll, seen = torch.zeros(count), torch.zeros(count)
            for part in range(how.accumulate):
                one = [batches[step][part] for batches in drawn]
                seed = silos[0][1] + step * how.accumulate + part if how.dropout else None
                more, part_nll, part_seen = gradient(tuned, tensors, still, one, resident, seed)
                grads = {n: g if n not in grads else grads[n] + g for n, g in more.items()}
                nll, seen = nll + part_nll, seen + part_seen
            for s in range(count):
                if failed[s] is None and not bool(nll[s].isfinite()):
                    failed[s] = (
                        f"the loss became {nll[s].item()} at local step {step + 1}: lower method.lr or method.clip"
                    )
            if all(failed):
                break
            total, places = total + nll, places + seen.long()
            scale = 1 / seen.clamp(min=1).to(
                device
            )  # summed over the step's places, then divided: the mean of all passes
            with torch.no_grad():
                for n, g in grads.items():
                    g.mul_(_along(scale, g))
                    if drifts:
                        part_of = g / len(how.lrs)
                        mean_gradient[n] = mean_gradient[n] + part_of if n in mean_gradient else part_of
                        g.add_(drifts[n])
                    if how.prox:
                        g.add_(tensors[n] - anchor[n], alpha=how.prox)
                if how.clip:
                    _clip(grads, how.clip)
                _update(tensors, grads, state, lr, how, calm)
            advance()
    for s in range(count):  # the last step's update has no later loss to show what it did
        if failed[s] is None and not all(bool(t[s].isfinite().all()) for t in tensors.values()):
            failed[s] = "the tensors are not finite after the last local step: lower method.lr or method.clip"
    loss = (total / places.clamp(min=1)).tolist()
    return Outcome(tensors, state, loss, places.tolist(), failed, mean_gradient)


def _plain(
    tuned: Tuned, tensors: Tensors, fixed: Tensors, batches: Sequence[Batch], resident: Resident, seed: int | None
) -> tuple[Tensors, Tensor, Tensor]:
    """Gradient of one silo's summed loss by ordinary autograd: the reference for the cohort step."""
    leaves = {n: t[0].detach().requires_grad_() for n, t in tensors.items()}
    # dropout's masks are drawn for the whole batch
    parts = pieces.parts(batches[0], resident.pad_id, resident.device) if seed is None else [batches[0]]
    grads = {n: torch.zeros_like(t) for n, t in leaves.items()}
    nll, seen, reached = torch.zeros(()), torch.zeros(()), False
    for part in parts:
        some = part.to(resident.device)
        with _attention(part, resident), contextlib.nullcontext() if seed is None else tuned.dropping(seed):
            part_nll, part_seen = tuned.losses(joined(leaves, fixed), some)
            found = torch.autograd.grad(part_nll, list(leaves.values()), allow_unused=True)
        for n, g in zip(leaves, found, strict=True):
            if g is not None:
                grads[n], reached = grads[n] + g, True
        nll, seen = nll + part_nll.detach().cpu(), seen + part_seen.cpu()
    if not reached:
        raise SiloError("no gradient reaches what is trained: the base's layers let none through; choose another base or method")
    return {n: g[None] for n, g in grads.items()}, nll[None], seen[None]


def _attention(batch: Any, resident: Resident) -> contextlib.AbstractContextManager[Any]:
    """Which kernels attention may take."""
    half = resident.device.type == "cpu" and resident.module.dtype == torch.bfloat16
    short = type(batch) is Batch and batch.input_ids.dim() == 2 and batch.input_ids.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if half and short else contextlib.nullcontext()


def _cohort(
    tuned: Tuned, tensors: Tensors, fixed: Tensors, batches: Sequence[Batch], resident: Resident, seed: int | None
) -> tuple[Tensors, Tensor, Tensor]:
    """The same for S silos in one pass over the shared base: `vmap` over stacked tensors and batches.

    Where rows are cut into pieces, each row is a lane of its own with its silo's tensors: rows of all silos are sorted by
    length together, and gradients added up for each silo.
    """
    count = sum(t[0].numel() for t in tensors.values())
    lanes = pieces.LANES // max(1, count)
    if lanes < pieces.LEAST or not pieces.worth(batches, resident.device):
        some = stack(list(batches), resident.pad_id).to(resident.device)
        grads, (nll, seen) = _each(tuned, tensors, fixed, some)
        return grads, nll.detach().cpu(), seen.cpu()
    grads = {n: torch.zeros_like(t) for n, t in tensors.items()}
    nll, seen = torch.zeros(len(batches)), torch.zeros(len(batches))
    for piece, owner in pieces.cut(batches, resident.pad_id, lanes):
        fields = (getattr(piece, name) for name in Batch.__dataclass_fields__)
        rows = Batch(*(f[:, None] if f.numel() else f.expand(len(owner), 0) for f in fields))  # (R, 1, T)
        more, (part_nll, part_seen) = _each(tuned, {n: t[owner] for n, t in tensors.items()}, fixed, rows)
        for n, g in more.items():
            grads[n].index_add_(0, owner, g)
        nll.index_add_(0, owner, part_nll.detach())
        seen.index_add_(0, owner, part_seen.float())
    return grads, nll, seen


def _each(tuned: Tuned, tensors: Tensors, fixed: Tensors, batches: Batch) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """Gradients, summed loss and places of each lane: tensors (L, ...), batches (L, B, T)."""

    def summed(mine: Tensors, *fields: Tensor) -> tuple[Tensor, Tensor]:
        return tuned.losses(joined(mine, fixed), Batch(*fields))

    each = torch.func.vmap(torch.func.grad_and_value(summed, has_aux=True))
    fields = [getattr(batches, name) for name in Batch.__dataclass_fields__]
    with sdpa_kernel(SDPBackend.MATH):  # plain matrix products: the fused kernels have no rule for a silo axis
        return each(tensors, *fields)


def _along(per_silo: Tensor, like: Tensor) -> Tensor:
    """(S,) -> (S, 1, ..., 1), to multiply something of shape (S, ...)."""
    return per_silo.view(-1, *[1] * (like.dim() - 1))


def _clip(grads: Tensors, limit: float) -> None:
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)  # (S,)
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    for g in grads.values():
        g.mul_(_along(factor, g))


def _moments(tensors: Tensors, moments: Sequence[Mapping[str, Tensor]], how: Local) -> Tensors:
    if how.optimizer == "sgd":
        return {}
    device = next(iter(tensors.values())).device
    blank = {f"{kind}/{n}": torch.zeros_like(t[0]) for kind in "mv" for n, t in tensors.items()}
    # counted per tensor: a round may train some of them only
    blank |= {f"step/{n}": torch.zeros((), device=device) for n in tensors}
    return {k: torch.stack([m[k].to(device) if k in m else blank[k] for m in moments]) for k in blank}


def _update(tensors: Tensors, grads: Tensors, state: Tensors, lr: float, how: Local, neutral: Tensors) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW) or SGD, in place."""
    for n, p in tensors.items():
        g = grads[n]
        if how.weight_decay:
            p.mul_(1 - lr * how.weight_decay)
            if n in neutral:
                p.add_(neutral[n], alpha=lr * how.weight_decay)
        if how.optimizer == "sgd":
            p.sub_(g, alpha=lr)
            continue
        m, v, t = state[f"m/{n}"], state[f"v/{n}"], state[f"step/{n}"].add_(1)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v / _along(1 - BETA2**t, v)).sqrt_().add_(EPSILON)
        p.sub_(m / denominator.mul_(_along(1 - BETA1**t, m)), alpha=lr)


def schedule(kind: str, progress: float, warmup: float) -> float:
    """Factor on the learning rate at `progress` (0..1 of all rounds), after a linear warm-up over the first `warmup`.

    constant: 1; linear: 1 -> 0; cosine: (1 + cos(pi x)) / 2. Runs over rounds: a silo's steps continue where the last
    round's ended, not from the start.
    """
    if progress < warmup:
        return progress / warmup
    x = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    return {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[kind]


def moments_of(progress: Outcome, s: int) -> dict[str, Any]:
    """One silo's optimizer state, for its memory."""
    return {k: t[s].cpu() for k, t in progress.moments.items()}
