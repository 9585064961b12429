"""The server's step, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedtailor import wire
from fedtailor.methods.averaging import State
from fedtailor.methods.fedopt import Server


def run(server: Server, deltas: list[float]) -> list[float]:
    """Where one number that begins at 1 is after each round's change."""
    state, seen = State({"w": torch.tensor([1.0])}), []
    for delta in deltas:
        tensors, moments = server.step(state.tensors, state.moments, {"w": torch.tensor([delta])})
        state = wire.unpack(wire.pack(State(tensors, moments)))
        seen.append(tensors["w"].item())
    return seen


def test_no_server_optimizer() -> None:
    assert run(Server("none", 1.0), [0.5, -0.25]) == pytest.approx([1.5, 1.25])
    assert run(Server("none", 0.1), [0.5, -0.25]) == pytest.approx([1.05, 1.025])


def test_server_momentum_by_hand() -> None:
    """m = .9 m + d: .5, then .9 * .5 - .25 = .2, then .9 * .2 + 0 = .18; each times .1."""
    method = Server("momentum", 0.1)
    assert run(method, [0.5, -0.25, 0.0]) == pytest.approx([1.05, 1.07, 1.088])


def test_server_adam_by_hand() -> None:
    """beta1 = .5, beta2 = .75, epsilon = .5, so v begins at .25.

    Round 1: m = .5 * 2 = 1; v = .75 * .25 + .25 * 4 = 1.1875.
    Round 2: m = .5 * 1 - .5 * 1 = 0: no move; v = .75 * 1.1875 + .25 = 1.140625.
    Round 3: m = .5 * 0 + .5 * 1 = .5; v = .75 * 1.140625 + .25 = 1.10546875.
    """
    method = Server("adam", 0.1, momentum=0.5, beta2=0.75, epsilon=0.5)
    first = 1 + 0.1 * 1 / (math.sqrt(1.1875) + 0.5)
    third = first + 0.1 * 0.5 / (math.sqrt(1.10546875) + 0.5)
    assert run(method, [2.0, -1.0, 1.0]) == pytest.approx([first, first, third], rel=1e-6)


def test_server_yogi_by_hand() -> None:
    """v moves by (1 - beta2) d^2 towards d^2: from .25 up by .25 * 4 to 1.25; then, above 1, down by .25 * 1 to 1."""
    method = Server("yogi", 0.1, momentum=0.5, beta2=0.75, epsilon=0.5)
    first = 1 + 0.1 * 1 / (math.sqrt(1.25) + 0.5)
    second = first + 0.1 * 1 / (math.sqrt(1.0) + 0.5)  # m = .5 * 1 + .5 * 1
    assert run(method, [2.0, 1.0]) == pytest.approx([first, second], rel=1e-6)
