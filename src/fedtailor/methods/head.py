"""Only an encoder's classifying head, over the base as it stands (linear probing): what features alone can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedtailor import added
from fedtailor.methods.averaging import Averaging, Positive
from fedtailor.models import Resident


@dataclass(frozen=True)
class Head(Averaging):
    FOR: ClassVar[tuple[str, ...]] = ("encoder", "vision")

    lr: Positive = 3e-2

    def config(self, resident: Resident) -> Any:
        return added.Nothing()
