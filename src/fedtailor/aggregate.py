"""Aggregators: (delta, weight) pairs in silo order -> one delta. One function each, found by name, or by
"package.module:function". `mean` needs no single reply and goes through `ask.total`; any other sees each reply."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from fedtailor import find as finding
from fedtailor.tuned import Tensors

Aggregate = Callable[[Sequence[tuple[Tensors, float]]], Tensors]


def mean(replies: Sequence[tuple[Tensors, float]]) -> Tensors:
    """Weighted mean (McMahan et al. 2017)."""
    total = sum(weight for _, weight in replies)
    return {n: sum(d[n] * (w / total) for d, w in replies) for n in replies[0][0]}  # type: ignore[misc]


def median(replies: Sequence[tuple[Tensors, float]]) -> Tensors:
    """Coordinate-wise median, weights ignored (Yin et al. 2018). An even count takes the mean of the middle two."""
    return {n: torch.stack([d[n] for d, _ in replies]).quantile(0.5, dim=0) for n in replies[0][0]}


def find(name: str) -> Aggregate:
    """The aggregator of that name. Raises UserError with the choices."""
    known = finding.functions(sys.modules[__name__]) - {"find"}
    found: Aggregate = finding.function(__name__, name, "method.aggregate", known)
    return found
