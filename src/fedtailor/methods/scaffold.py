"""SCAFFOLD's control variates (Karimireddy et al. 2020, option II): who holds which, and when a new one counts.

A silo's variate c_i is its mean gradient over the round's steps: the paper's c_i - c + (x - y) / (K lr) for plain SGD. The
server's c is the plain mean of all silos' c_i. So that a lost reply parts neither from the other, what a silo sent counts
for it only once the server says that it heard it: `heard` names the last round of each silo whose reply was used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtailor.core import Reply
from fedtailor.tuned import Tensors

UNEQUAL = "sets fewer numbers than [method] trains: scaffold's mean would be too small there; leave it out, or scaffold = false"


@dataclass(frozen=True)
class Shift:
    """What a round's usable replies tell: the sum of the changes of their silos' variates."""

    sum: Tensors
    silos: tuple[str, ...]


def variate(name: str, memory: Mapping[str, Any], heard: Mapping[str, int]) -> Tensors:
    """A silo's own, as the server counts it."""
    kept: Tensors = memory.get("control", {})
    sent: Mapping[str, Any] = memory.get("sent", {})
    return {**kept, **sent["control"]} if sent and heard.get(name) == sent["round"] else kept


def told(before: Tensors, gradient: Tensors, weight: float) -> Tensors:
    """The change that goes up: over the reply's weight, so that the weighted sum of replies is the plain sum of changes."""
    return {n: (g - before.get(n, torch.zeros_like(g))) / weight for n, g in gradient.items()}


def shift(replies: Sequence[Reply[Any]]) -> Shift:
    """In silo order, in fp32: as `ask.total` adds."""
    whole: Tensors = {}
    for reply in replies:
        for n, c in reply.body.control.items():
            whole[n] = whole[n] + c * reply.body.weight if n in whole else c * reply.body.weight
    return Shift(whole, tuple(reply.silo for reply in replies))
