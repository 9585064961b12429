"""Aggregators: (delta, weight) pairs in silo order -> one delta. One function each, found by name, or by
"package.module:function". `mean` needs no single reply and goes through `ask.total`; any other sees each reply.

A weight is a silo's word: where weights count, they are the attackers' to raise, as far as `Averaging.most_rows` lets them. What
takes a keyword `byzantine` is given method.byzantine, the assumed share of attackers; of n replies that is floor(byzantine * n).
"""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtailor import find as finding
from fedtailor.tuned import Tensors, norm

Replies = Sequence[tuple[Tensors, float]]
Aggregate = Callable[[Replies], Tensors]
BYZANTINE = 0.2
FAR = 1e6  # times a usual distance: from there on, geometric_median asks for the direction alone
CHUNK = 2**20  # numbers of each reply in fp64 at a time


def mean(replies: Replies) -> Tensors:
    """Weighted mean (McMahan et al. 2017). One attacker moves it anywhere."""
    total = sum(weight for _, weight in replies)
    return _combined(replies, [weight / total for _, weight in replies])


def median(replies: Replies) -> Tensors:
    """Coordinate-wise median, weights ignored (Yin et al. 2018). An even count takes the mean of the middle two."""
    return _trimmed(replies, (len(replies) - 1) // 2)


def trimmed_mean(replies: Replies, *, byzantine: float = BYZANTINE) -> Tensors:
    """Coordinate-wise mean without the share `byzantine` of the values at *each* end, weights ignored (Yin et al. 2018)."""
    return _trimmed(replies, _attackers(len(replies), byzantine))


def krum(replies: Replies, *, byzantine: float = BYZANTINE) -> Tensors:
    """The one reply that is nearest to its neighbours, weights ignored (Blanchard et al. 2017): of n replies, f of them
    assumed to be attackers', that with the least sum of squared distances to its n - f - 2 nearest. Equals: the first."""
    return dict(replies[_by_krum(replies, byzantine)[0]][0])


def multi_krum(replies: Replies, *, byzantine: float = BYZANTINE) -> Tensors:
    """Weighted mean of the n - f replies that `krum` would take first (Blanchard et al. 2017)."""
    best = _by_krum(replies, byzantine)[: len(replies) - _attackers(len(replies), byzantine)]
    return mean([replies[i] for i in sorted(best)])


def geometric_median(replies: Replies) -> Tensors:
    """The point with the least weighted sum of distances to all replies, by the smoothed Weiszfeld algorithm (Pillutla et al.
    2019, RFA): it stands attackers of less than half of the weight. Distances below a millionth of the median distance between
    two replies count as that. A reply a million times as far from the most central one as others are is drawn nearer first:
    only its direction counts, and beside 1e30 the others' differences would be lost in rounding."""
    weights = torch.tensor([weight for _, weight in replies], dtype=torch.float64)
    distances = _squared_distances(replies).sqrt()
    middle = int((distances @ weights).argmin())
    apart = distances[middle]
    if weights[apart == 0].sum() > weights.sum() / 2:
        return dict(replies[middle][0])
    replies = _drawn_near(replies, middle, [far if far > 0 else 1.0 for far in apart.tolist()], FAR * _low(apart))
    squared = _squared_distances(replies)
    between = squared.sqrt()[torch.ones_like(squared).triu(1).bool()]
    least = max(1e-6 * between.median().item(), 1e-30) if len(replies) > 1 else 1.0
    # each step is a weighted mean of the replies, so that its distances to them follow from theirs to each other
    share = weights / weights.sum()
    for _ in range(1000):
        toward = squared @ share
        distance = (toward - share @ toward / 2).clamp(min=0).sqrt()
        new = weights / distance.clamp(min=least)
        before, share = share, new / new.sum()
        if torch.allclose(share, before, rtol=1e-9, atol=0):
            break
    return _combined(replies, share.tolist())


def nnm_median(replies: Replies, *, byzantine: float = BYZANTINE) -> Tensors:
    """`median` of mixed replies (NNM, Allouah et al. 2023, "Fixing by mixing"): each of n replies gives way to the plain mean
    of the n - f nearest to it, itself among them, so that honest ones are more alike before they are compared."""
    return median(_mixed(replies, byzantine))


def nnm_geometric_median(replies: Replies, *, byzantine: float = BYZANTINE) -> Tensors:
    """`geometric_median` of replies mixed as in `nnm_median`, each with the weight of the reply in whose place it is."""
    return geometric_median(_mixed(replies, byzantine))


def norm_clipping(replies: Replies) -> Tensors:
    """Weighted mean of replies none of which is longer than the median of their norms (Sun et al. 2019, "Can you really backdoor
    federated learning?", where the bound is a setting). It bounds what an attacker can do, and does not undo it."""
    norms = [norm(delta) for delta, _ in replies]
    bound, total = statistics.median(norms), sum(weight for _, weight in replies)
    clipped = [min(1.0, bound / length) if length else 1.0 for length in norms]
    return _combined(replies, [weight / total * c for (_, weight), c in zip(replies, clipped, strict=True)])


def find(name: str, byzantine: float = BYZANTINE) -> Aggregate:
    """The aggregator of that name, told the share of attackers if it asks for it. Raises UserError with the choices."""
    known = finding.functions(sys.modules[__name__]) - {"find"}
    found: Callable[..., Tensors] = finding.function(__name__, name, "method.aggregate", known)
    try:
        asks = "byzantine" in inspect.signature(found).parameters
    except ValueError:  # a builtin that does not say what it takes
        asks = False
    return functools.partial(found, byzantine=byzantine) if asks else found


def _combined(replies: Replies, factors: Sequence[float]) -> Tensors:
    return {n: sum(d[n] * f for (d, _), f in zip(replies, factors, strict=True)) for n in replies[0][0]}  # type: ignore[misc]


def _attackers(count: int, byzantine: float) -> int:
    return math.floor(byzantine * count + 1e-9)  # 0.29 * 100 is a little less than 29


def _trimmed(replies: Replies, each: int) -> Tensors:
    """The coordinate-wise mean without the `each` lowest and highest, added in fp64."""
    found = {}
    for n, like in replies[0][0].items():
        ranked = torch.stack([d[n] for d, _ in replies]).sort(dim=0).values[each : len(replies) - each]
        found[n] = ranked.mean(dim=0, dtype=torch.float64).to(like.dtype)
    return found


def _mixed(replies: Replies, byzantine: float) -> Replies:
    """Each reply as the mean of the n - f nearest to it; all of them are held beside the replies."""
    near = len(replies) - _attackers(len(replies), byzantine)
    order = _squared_distances(replies).argsort(dim=1, stable=True)[:, :near].tolist()
    neighbours = [[replies[i] for i in sorted(places)] for places in order]
    return [(_combined(some, [1 / near] * near), weight) for some, (_, weight) in zip(neighbours, replies, strict=True)]


def _low(distances: Tensor) -> float:
    return float(statistics.median_low([one for one in distances.tolist() if one > 0]))


def _drawn_near(replies: Replies, middle: int, apart: Sequence[float], bound: float) -> Replies:
    """Those farther than the bound from the middle one, on the same line from it at the bound."""
    center = replies[middle][0]
    return [
        (delta if far <= bound else {n: center[n] + (t - center[n]) * (bound / far) for n, t in delta.items()}, weight)
        for (delta, weight), far in zip(replies, apart, strict=True)
    ]


def _by_krum(replies: Replies, byzantine: float) -> list[int]:
    """Places of the replies by Krum's score, the best first."""
    count = len(replies)
    near = max(1, count - _attackers(count, byzantine) - 2)
    ranked = _squared_distances(replies).sort(dim=1).values[:, 1 : 1 + near]  # the first is the distance to itself
    scores = ranked.sum(dim=1).tolist()
    return sorted(range(count), key=scores.__getitem__)


def _squared_distances(replies: Replies) -> Tensor:
    """(n, n), fp64, between replies as vectors of all their numbers; a chunk at a time, so that no reply is copied whole."""
    found = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for n in replies[0][0]:
        for parts in zip(*(d[n].reshape(-1).split(CHUNK) for d, _ in replies), strict=True):
            each = torch.stack(parts).double()
            # not by matrix products, whose rounding is as large as what lies between replies that are nearly alike
            found += torch.cdist(each, each, compute_mode="donot_use_mm_for_euclid_dist").square()
    return found
