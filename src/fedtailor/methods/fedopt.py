"""The server's step: the mean change of the silos as a (negative) gradient (FedOpt, Reddi et al. 2021, algorithm 2).

none       the mean change itself, times lr
momentum   FedAvgM (Hsu et al. 2019), undamped: a constant change moves lr / (1 - momentum) times as far
adam       each number's change over its own size: moves about lr a round, whatever the change's size
yogi       as adam, with a second moment that grows and shrinks more slowly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedtailor.tuned import Tensors

# momentum and none move by the change itself; adam and yogi by about lr in every number, as AdamW does in a silo
LR = {"none": 1.0, "momentum": 1.0, "adam": 1e-2, "yogi": 1e-2}
EPSILON = 1e-6  # well below a round's change of an adapter, 1e-4 to 1e-2: a larger one would outweigh the change's own size


@dataclass(frozen=True)
class Server:
    kind: Literal["none", "momentum", "adam", "yogi"]
    lr: float
    momentum: float = 0.9
    beta2: float = 0.99
    epsilon: float = EPSILON  # tau of the paper: beside the square root of the second moment, and its start

    def step(self, tensors: Tensors, moments: Tensors, delta: Tensors) -> tuple[Tensors, Tensors]:
        """Tensors and moments ("m/<name>", "v/<name>") after the mean change `delta` of the same names and shapes."""
        if self.kind == "none":
            return {n: t + self.lr * delta[n] for n, t in tensors.items()}, {}
        after, kept = {}, {}
        for n, t in tensors.items():
            d = delta[n]
            m = moments.get(f"m/{n}", torch.zeros_like(t))
            if self.kind == "momentum":
                m = self.momentum * m + d
                after[n] = t + self.lr * m
            else:
                v = moments.get(f"v/{n}", torch.full_like(t, self.epsilon**2))
                m = self.momentum * m + (1 - self.momentum) * d
                gain = (1 - self.beta2) * d.square()
                v = self.beta2 * v + gain if self.kind == "adam" else v - gain * (v - d.square()).sign()
                after[n] = t + self.lr * m / (v.sqrt() + self.epsilon)
                kept[f"v/{n}"] = v
            kept[f"m/{n}"] = m
        return after, kept
