"""Texts that many rows begin with (an instruction, examples) are read once: their keys and values are kept, and shared.

Candidates that begin alike share what they have in common: a new text is read on from the kept one that it agrees with
longest, so of two prompts with the same examples in front the examples are read once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedtailor.tuned import Tuned

MOST = 4  # texts kept: of a small model some hundred kilobytes each


@dataclass
class Prefixes:
    """Of one model, with one set of tensors on it; whoever scores a pool of candidates makes one, and drops it."""

    known: list[tuple[list[int], Any]] = field(default_factory=list)  # token ids, their cache; the last used at the end
    tokens: int = 0  # read so far, for those who want to know what sharing saves

    def cache(self, tuned: Tuned, tensors: Mapping[str, Tensor] | None, ids: Sequence[int]) -> Any:
        """A cache of these tokens, one row, for the caller to spread and to write into."""
        shared, best = 0, None
        for known in self.known:
            if (same := common(known[0], ids)) > shared:
                shared, best = same, known
        if best is not None and shared == len(ids) == len(best[0]):
            self.known.remove(best)
            self.known.append(best)
            return copy.deepcopy(best[1])
        cache = None
        shared = min(shared, len(ids) - 1)  # one token at least is read, as there must be something to read
        if best is not None and shared > 0:
            cache = copy.deepcopy(best[1])
            if (beyond := len(best[0]) - shared) > 0:
                cache.crop(-beyond)
        cache = self._read(tuned, tensors, ids, cache, shared if cache is not None else 0)
        self.known = [*self.known[-(MOST - 1) :], (list(ids), copy.deepcopy(cache))]
        return cache

    def _read(self, tuned: Tuned, tensors: Mapping[str, Tensor] | None, ids: Sequence[int], cache: Any, done: int) -> Any:
        device = tuned.base.device
        rest = torch.tensor([ids[done:]], device=device)
        mask = torch.ones(1, len(ids), dtype=torch.long, device=device)
        places = torch.arange(done, len(ids), device=device)[None]
        self.tokens += len(ids) - done
        return tuned.using(tensors, rest, mask, places, 1, cache)[1]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
