"""Faults: replies -> replies, injected by the engine after the wire, so that methods never know.

One function each; a setting of [faults] by the function's name turns it on. Seeded by experiment, round and exchange.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from pydantic import Field

from fedtailor.core import Reply
from fedtailor.errors import UserError, suggest

Fraction = Annotated[float, Field(ge=0, le=1)]
Replies = Iterator[Reply[Any]]


@dataclass(frozen=True)
class Faults:
    """The [faults] part of an experiment. All off by default. Evaluation is not disturbed."""

    dropout: Fraction = 0.0  # of replies that never arrive
    nan: tuple[str, ...] = ()  # silos whose tensors arrive as NaN
    sign_flip: tuple[str, ...] = ()  # silos that send the opposite of what they learnt
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation of Gaussian noise on every tensor

    def check(self, silos: Collection[str]) -> None:
        """Raises UserError for a silo that the data has not."""
        for name in (*self.nan, *self.sign_flip):
            if name not in silos:
                raise UserError(f"[faults]: the data has no silo {name!r}{suggest(name, silos)}")

    def inject(self, replies: Replies, seed: int) -> Replies:
        dice = random.Random(seed)
        for item in fields(self):
            if getattr(self, item.name):
                replies = globals()[item.name](replies, getattr(self, item.name), dice)
        return replies


def dropout(replies: Replies, fraction: float, dice: random.Random) -> Replies:
    return (reply for reply in replies if dice.random() >= fraction)


def nan(replies: Replies, silos: tuple[str, ...], dice: random.Random) -> Replies:
    return (_changed(reply, lambda t: t * float("nan")) if reply.silo in silos else reply for reply in replies)


def sign_flip(replies: Replies, silos: tuple[str, ...], dice: random.Random) -> Replies:
    return (_changed(reply, torch.neg) if reply.silo in silos else reply for reply in replies)


def noise(replies: Replies, deviation: float, dice: random.Random) -> Replies:
    for reply in replies:
        source = torch.Generator().manual_seed(dice.getrandbits(63))
        yield _changed(reply, lambda t, source=source: t + deviation * torch.randn(t.shape, generator=source))


def _changed(reply: Reply[Any], how: Any) -> Reply[Any]:
    """The reply with its dictionaries of tensors changed, everything else as it came."""
    body = reply.body
    new = {
        f.name: {k: how(t) for k, t in getattr(body, f.name).items()}
        for f in fields(body)
        if isinstance(getattr(body, f.name), dict)
        and all(isinstance(t, torch.Tensor) for t in getattr(body, f.name).values())
    }
    return Reply(reply.silo, replace(body, **new))
