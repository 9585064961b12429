"""A step's rows in pieces of like length: what padding would take of a pass is not computed.

The loss of a step is a sum over rows, so the gradients of its pieces add up to the step's own. In short rows of unequal
length (sentences of 5 to 60 tokens) half of a batch, and more of a cohort, is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fedtailor.tuned import IGNORED, Batch, stack

PLACES = 768  # tokens of a piece for each thread, padding included: measured best on a CPU (500 to 1000 are alike)
STEP = 8  # widths are multiples of it: a CPU's matrix products are prepared anew for every shape that they meet
LANES = 2**25  # numbers of trained tensors, copied for each row of a piece of a cohort: 128 MiB in fp32
LEAST = 8  # rows: of larger tensors a piece would hold fewer, and the cohort is better taken silo by silo


def worth(batches: Sequence[Batch], device: torch.device) -> bool:
    """Whether to cut: texts, left-padded, on a CPU, of more places than one piece has. A card is fastest with all at once."""
    if device.type != "cpu" or not all(type(one) is Batch and one.input_ids.dim() == 2 for one in batches):
        return False
    if any(one.pixels.dim() > 1 or one.decoder_ids.dim() > 1 for one in batches):
        return False
    rows, width = sum(len(one.input_ids) for one in batches), max(one.input_ids.shape[1] for one in batches)
    return rows * width > room()


def room() -> int:
    """Places of one piece."""
    return PLACES * torch.get_num_threads()


def parts(batch: Batch, pad_id: int, device: torch.device) -> list[Batch]:
    """One silo's batch, cut where it is worth it."""
    return [piece for piece, _ in cut([batch], pad_id)] if worth([batch], device) else [batch]


def cut(batches: Sequence[Batch], pad_id: int, most: int | None = None) -> list[tuple[Batch, Tensor]]:
    """Batches of S silos, (B, T) each -> pieces of rows (R, T') and the silo of each row (R,), `most` rows in each at most."""
    whole = stack(list(batches), pad_id)  # (S, B, T)
    owner = torch.arange(len(batches)).repeat_interleave(whole.input_ids.shape[1])
    rows = Batch(*(getattr(whole, name).flatten(0, 1) for name in ("input_ids", "attention_mask", "position_ids", "labels")))
    lengths, order = rows.attention_mask.sum(1).sort(stable=True)
    longest = rows.input_ids.shape[1]
    widths = [min(-(-n // STEP) * STEP, longest) for n in lengths.tolist()]
    starts = [0]
    for i, width in enumerate(widths):
        count = i + 1 - starts[-1]
        if count > 1 and (count * width > room() or count > (most or count)):
            starts.append(i)
    return [
        (_some(rows, order[a:b], widths[b - 1]), owner[order[a:b]]) for a, b in pairwise([*starts, len(widths)])
    ]


def _some(rows: Batch, taken: Tensor, width: int) -> Batch:
    """These rows, without the columns that are padding in all of them."""
    mine = rows.labels[taken]  # (R, K), or (R,) classes
    if mine.dim() == 2:
        told = (mine != IGNORED).any(0).nonzero()
        mine = mine[:, int(told[0]) if len(told) else -1 :]
    ids, mask, places = (f[taken, -width:] for f in (rows.input_ids, rows.attention_mask, rows.position_ids))
    return Batch(ids, mask, places, mine)
