"""How what several silos say of a place becomes one distribution: one function each, found by name.

Each takes `probs` (S, P, C), of S silos at P places over C outcomes; `spoken` (S, P), who spoke of which place; and
`losses` (S, P), in nats, lower is better: each silo's mean loss on rows of its own, the same at all places; for `familiar` how
strange each public row is to it. It returns (P, C), each row adding up to 1; of a place that nobody spoke of, any.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fedtailor import find as finding
from fedtailor.distilling import LEAST, Way

EVIDENCE = 4  # a row's tokens count as so many independent ones: with all of them, as naive Bayes has it, one silo decides


def mean(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """Every silo that spoke counts the same (FedMD, FedDF)."""
    return _weighed(probs, spoken.float())


def validation(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """In proportion to exp(-loss): a silo that answers its own rows well is believed more."""
    return _weighed(probs, _trust(spoken, losses))


def entropy(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """At each place in proportion to exp(-entropy): a silo that is sure there is believed more."""
    return _weighed(probs, spoken.float() * _sure(probs))


def familiar(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """As `entropy`, and in proportion to how likely the row's tokens are among the silo's own (`proxies.strangeness`): a silo is
    believed more about rows of its own kind (DaFKD, Wang et al. 2023, where silos train a discriminator). For silos with about
    as many rows each: to one with few every row is stranger, its own kind, too."""
    return _weighed(probs, _trust(spoken, EVIDENCE * losses) * _sure(probs))


def median(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """The middle one of each outcome, over silos that spoke: fewer than half of them cannot move it out of what others say."""
    hidden = probs.masked_fill(~spoken[..., None], torch.nan)
    low, high = hidden.nanquantile(0.5, dim=0, interpolation="lower"), hidden.nanquantile(0.5, dim=0, interpolation="higher")
    return _normal(((low + high) / 2).nan_to_num(1.0))


def trimmed(probs: Tensor, spoken: Tensor, losses: Tensor) -> Tensor:
    """The mean of each outcome without its highest and lowest quarter (rounded up, as long as one is left)."""
    count = spoken.sum(0)  # (P,)
    gone = torch.minimum(-(-count // 4), (count - 1).clamp(min=0) // 2)
    ranked = probs.masked_fill(~spoken[..., None], torch.inf).sort(0).values  # those that did not speak come last
    rank = torch.arange(len(probs))[:, None]
    kept = (rank >= gone) & (rank < count - gone)
    return _normal(ranked.masked_fill(~kept[..., None], 0.0).sum(0) / kept.sum(0).clamp(min=1)[:, None])


def find(name: str) -> Way:
    """The consensus of that name. Raises UserError with the choices."""
    found: Way = finding.function(__name__, name, "method.consensus", names())
    return found


def names() -> set[str]:
    return finding.functions(sys.modules[__name__]) - {"find", "names"}


def _trust(spoken: Tensor, losses: Tensor) -> Tensor:
    """(S, P) in proportion to exp(-loss); 0 of who did not speak."""
    return (-losses).masked_fill(~spoken, -torch.inf).softmax(0).nan_to_num(0.0)


def _sure(probs: Tensor) -> Tensor:
    """(S, P) exp(-entropy): 1 of who is certain, 1 / C of who says all are as likely."""
    return (probs * probs.clamp(min=LEAST).log()).sum(-1).exp()


def _weighed(probs: Tensor, weights: Tensor) -> Tensor:
    """(S, P, C), (S, P) -> (P, C)"""
    return _normal((probs * weights[..., None]).sum(0) / weights.sum(0).clamp(min=1e-30)[:, None])


def _normal(probs: Tensor) -> Tensor:
    probs = probs.clamp(min=LEAST)
    return probs / probs.sum(-1, keepdim=True)
