"""What a silo tells at most, whoever asks: its owner's limits (silo.toml) and the experiment's ([silo.NAME]) together,
the stricter of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from fedtailor.errors import SiloError
from fedtailor.privacy import Noise

TOLD = "told"  # of a silo's memory: what stands under this key is kept even where the rest goes back to an earlier round


@dataclass(frozen=True)
class Limits:
    """The [limits] of a silo.toml. They hold in every run; the account that `epsilon` bounds begins anew with each."""

    minimum: Annotated[int, Field(ge=1)] = 1  # rows in a sum of scores or of counts, of whichever split
    epsilon: Annotated[float, Field(gt=0)] = math.inf  # of each training row; where it is set, sums without noise are refused
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # the largest that may be asked for, with Gaussian noise


def of(data: Any) -> Limits:
    """The stricter of what the silo's owner set and what the experiment sets for it."""
    own, asked = getattr(data, "limits", Limits()), getattr(data, "settings", {})
    epsilon = min(own.epsilon, float(asked.get("epsilon", math.inf)))
    return Limits(max(own.minimum, int(asked.get("minimum", 1))), epsilon, own.delta)


def counted(data: Any, split: str) -> Sequence[Any]:
    """The rows of a split, to be counted: none where they are fewer than the minimum. Raises SiloError for training rows
    under a limit: counts of these would go round the account of what was told of them."""
    limits, rows = of(data), getattr(data, split)
    if split not in ("val", "test") and (limits.minimum > 1 or limits.epsilon < math.inf):
        raise SiloError(f"its limits let rows of val and test be counted, not those of {split}: ask for val or test")
    return rows if len(rows) >= limits.minimum else ()


def check(noise: Noise, limits: Limits) -> None:
    """Raises SiloError for noise that cannot be accounted for, or that hides less than this silo asks for."""
    if noise.kind == "none":
        if limits.epsilon < math.inf:
            raise SiloError(f"it tells of its rows under noise alone (epsilon {limits.epsilon:g} at most): set method.noise")
        return
    if (why := noise.problem()) is not None:
        raise SiloError(why)
    if noise.kind == "gaussian" and noise.delta > limits.delta:
        raise SiloError(f"delta = {noise.delta:g} is above the {limits.delta:g} that it allows: lower method.delta")
