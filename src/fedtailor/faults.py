"""Faults: replies -> replies, injected by the engine after the wire, so that methods never know; and who is at fault.

Seeded by experiment, round and exchange; which silos attack, and which are slow, by the experiment's seed alone. Attacks on rows,
in place of replies, are in `poisoning`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from fedtailor.core import Reply
from fedtailor.errors import UserError, suggest
from fedtailor.tuned import Tensors, norm

Replies = Iterator[Reply[Any]]
Sent = Callable[[Tensors, float, torch.Generator], Tensors]  # what was learnt, strength, dice -> what is sent in its place
ON_ROWS = ("label_flip", "backdoor")
SIGMA = 0.25  # of the logarithm of the time that a reply takes


def _some(given: Any) -> Any:
    if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
        return tuple(given)
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given <= 1:
        return float(given)
    raise ValueError(f'must be a share of the silos, 0 to 1, or a list of their names, as ["shop"], not {given!r}')


def _worded(given: Any) -> Any:
    return "nan" if isinstance(given, float) and math.isnan(given) else given  # as TOML reads nan without quotes


Fraction = Annotated[float, Field(ge=0, le=1)]
Some = Annotated[float | tuple[str, ...], BeforeValidator(_some)]  # a share of the silos, drawn once per run, or their names
Attack = Annotated[
    Literal["sign_flip", "scaled", "gaussian", "nan", "label_flip", "backdoor"], BeforeValidator(_worded)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Faults:
    """The [faults] part of an experiment. All off by default. Evaluation is not disturbed."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        name: f"write attackers = [...], attack = {name!r}" for name in ("nan", "sign_flip")
    }

    attackers: Some = 0.0
    attack: Attack = "sign_flip"  # what they do: to replies, see `SENT`; to rows, see `poisoning`
    strength: Positive = 1.0  # of sign_flip, scaled, gaussian
    trigger: str = "cf"  # of backdoor: the word in front of the text
    target: Annotated[int, Field(ge=0)] = 0  # of backdoor: the place in data.labels of what the trigger is to make of a text
    dropout: Fraction = 0.0  # of replies that never arrive
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation of Gaussian noise on every tensor
    slow: Some = 0.0
    slowness: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0  # times that a slow silo takes as long as a usual one
    deadline: Positive | None = None  # of an exchange, in times of a usual silo's time; later replies are ignored

    def __post_init__(self) -> None:
        if self.strength != 1 and self.attack not in (strong := [sign_flip.__name__, scaled.__name__, gaussian.__name__]):
            raise ValueError(f"strength is of {', '.join(strong)}; attack = {self.attack!r} has none, so leave it out")
        if (self.trigger, self.target) != ("cf", 0) and self.attack != "backdoor":
            raise ValueError(f"trigger and target are of backdoor; attack = {self.attack!r} has none, so leave them out")
        if not self.trigger.strip():
            raise ValueError("trigger must be a word, not empty")

    def check(self, silos: Collection[str]) -> None:
        """Raises UserError for a silo that the data has not, and for a share that is of too few silos to be one of them."""
        for what, some in (("attackers", self.attackers), ("slow", self.slow)):
            for name in some if isinstance(some, tuple) else ():
                if name not in silos:
                    raise UserError(f"[faults] {what}: the data has no silo {name!r}{suggest(name, silos)}")
            if some and not _names(some, silos, 0, what):
                least = f"{math.ceil(50 / len(silos)) / 100:g}"
                raise UserError(f"[faults] {what} = {some} of {len(silos)} silos is none; choose {least} or more, or name them")

    def settled(self, silos: Collection[str], seed: int) -> Faults:
        """With names in place of shares: of `silos`, all of the experiment's, as this seed draws them."""
        attackers, slow = (_names(getattr(self, what), silos, seed, what) for what in ("attackers", "slow"))
        return replace(self, attackers=attackers, slow=slow)

    def inject(self, replies: Replies, seed: int, missing: dict[str, str] | None = None) -> Replies:
        """What is left of the replies of one exchange. Why one is ignored is said in `missing`."""
        dice = random.Random(seed)
        if self.dropout:
            replies = dropout(replies, self.dropout, dice)
        if self.deadline is not None:
            replies = self._in_time(replies, seed, {} if missing is None else missing)
        if self.attackers and self.attack in SENT:
            replies = self._attacked(replies, seed)
        if self.noise:
            replies = noise(replies, self.noise, dice)
        return replies

    def waited(self, silos: Sequence[str], seed: int) -> float:
        """How long an exchange takes, in times of a usual silo's: as the slowest, or until the deadline. 0 where no silo is
        slow, and no deadline is set."""
        if not silos or (not self.slow and self.deadline is None):
            return 0.0
        return min(max(self._time(silo, seed) for silo in silos), math.inf if self.deadline is None else self.deadline)

    def _time(self, silo: str, seed: int) -> float:
        """Log-normal, its median 1, or `slowness` for the slow; of a silo's own, whoever else is asked."""
        return _dice("time", seed, silo).lognormvariate(0, SIGMA) * (self.slowness if silo in _listed(self.slow) else 1)

    def _in_time(self, replies: Replies, seed: int, missing: dict[str, str]) -> Replies:
        assert self.deadline is not None
        for reply in replies:
            if self._time(reply.silo, seed) <= self.deadline:
                yield reply
            else:
                missing[reply.silo] = f"later than the deadline (faults.deadline = {self.deadline:g})"

    def _attacked(self, replies: Replies, seed: int) -> Replies:
        sent, attackers = SENT[self.attack], _listed(self.attackers)
        for reply in replies:
            dice = torch.Generator().manual_seed(_dice("attack", seed, reply.silo).getrandbits(63))
            yield _changed(reply, sent, self.strength, dice) if reply.silo in attackers else reply


def sign_flip(learnt: Tensors, strength: float, dice: torch.Generator) -> Tensors:
    """The opposite, `strength` times (Li et al. 2019, RSA, where it is 4)."""
    return {n: -strength * t for n, t in learnt.items()}


def scaled(learnt: Tensors, strength: float, dice: torch.Generator) -> Tensors:
    """`strength` times as much (Bagdasaryan et al. 2020: as many times as there are silos replaces the mean)."""
    return {n: strength * t for n, t in learnt.items()}


def gaussian(learnt: Tensors, strength: float, dice: torch.Generator) -> Tensors:
    """Noise, whose norm over all tensors together is `strength` times that of what was learnt."""
    drawn = {n: torch.randn(t.shape, generator=dice) for n, t in learnt.items()}
    length = norm(drawn)
    return {n: t * (strength * norm(learnt) / length) for n, t in drawn.items()} if length else drawn


def nan(learnt: Tensors, strength: float, dice: torch.Generator) -> Tensors:
    """Not a number, everywhere."""
    return {n: t * float("nan") for n, t in learnt.items()}


SENT: Mapping[str, Sent] = {sent.__name__: sent for sent in (sign_flip, scaled, gaussian, nan)}


def dropout(replies: Replies, fraction: float, dice: random.Random) -> Replies:
    return (reply for reply in replies if dice.random() >= fraction)


def noise(replies: Replies, deviation: float, dice: random.Random) -> Replies:
    for reply in replies:
        source = torch.Generator().manual_seed(dice.getrandbits(63))
        yield _changed(reply, _noisy, deviation, source)


def _noisy(learnt: Tensors, deviation: float, dice: torch.Generator) -> Tensors:
    return {n: t + deviation * torch.randn(t.shape, generator=dice) for n, t in learnt.items()}


def _names(some: float | tuple[str, ...], silos: Collection[str], seed: int, what: str) -> tuple[str, ...]:
    if isinstance(some, tuple):
        return some
    count = math.floor(some * len(silos) + 0.5)
    return tuple(sorted(random.Random(f"faults/{what}/{seed}").sample(sorted(silos), count)))


def _listed(some: float | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(some, tuple):
        return some
    if some:
        raise ValueError("a share of the silos is of no silo yet: see `Faults.settled`")
    return ()


def _dice(what: str, seed: int, silo: str) -> random.Random:
    return random.Random(f"faults/{what}/{seed}/{silo}")


def struck(body: Any) -> dict[str, Tensors]:
    """What of a reply attacks and noise change: its fields that are dictionaries of tensors, and not empty."""
    held = {f.name: getattr(body, f.name) for f in fields(body)}
    return {
        name: value for name, value in held.items()
        if isinstance(value, dict) and value and all(isinstance(t, torch.Tensor) for t in value.values())
    }  # fmt: skip


def _changed(reply: Reply[Any], how: Sent, strength: float, dice: torch.Generator) -> Reply[Any]:
    """The reply with its dictionaries of tensors changed, everything else as it came."""
    new = {name: how(learnt, strength, dice) for name, learnt in struck(reply.body).items()}
    return Reply(reply.silo, replace(reply.body, **new))
