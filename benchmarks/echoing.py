"""What the silos of benchmarks/engines.py run: each sends back what it gets, some of them late. Their silo.toml allows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtailor.core import Silo, in_silo

SLOW = ("silo_2", "silo_5", "silo_9")


@dataclass(frozen=True)
class Blob:
    """Down and up."""

    tensors: Mapping[str, Tensor]


@in_silo(memory=False)
def echo(silo: Silo, body: Blob) -> Blob:
    return body


@in_silo(memory=False)
def sleepy(silo: Silo, body: Blob) -> Blob:
    if silo.name in SLOW:
        time.sleep(60)
    return body
