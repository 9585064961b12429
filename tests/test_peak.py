"""Peak memory: what was held since the reset, whether or not it is still held."""

from __future__ import annotations

import sys

import pytest
import torch

from fedtailor import peak

MB = 10**6


def held(megabytes: int) -> None:
    """Touch that much memory, and let go of it."""
    block = torch.ones(megabytes * MB, dtype=torch.uint8)
    assert int(block[-1]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_peak_shows_what_was_held_and_a_reset_forgets_it() -> None:
    assert peak.reset()
    before = peak.megabytes()
    held(150)
    after = peak.megabytes()
    assert 140 < after - before < 200
    assert peak.reset()
    assert peak.megabytes() < after - 100
    again = peak.megabytes()
    held(50)
    assert 45 < peak.megabytes() - again < 100


def test_a_peak_never_falls_by_itself() -> None:
    first = peak.megabytes()
    held(20)
    assert peak.megabytes() >= first > 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_what_was_let_go_of_goes_back_to_the_system() -> None:
    """Small blocks are kept by the allocator for later: 200,000 of them stay resident without a trim."""
    peak.reset()
    before = peak.megabytes()
    blocks = [torch.ones(64) for _ in range(200_000)]
    keep = blocks[-1]  # at the top of the heap: what is below it is free, and in the process still
    grown = peak.megabytes() - before
    assert grown > 50
    del blocks
    peak.reset()
    assert peak.megabytes() - before < grown / 2
    assert keep.sum() == 64
