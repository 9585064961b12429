"""Faults strike replies, each in its own way, the same ones for the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedtailor import faults
from fedtailor.core import Reply
from fedtailor.faults import Faults


@dataclass(frozen=True)
class Up:
    delta: dict[str, torch.Tensor]
    weight: float = 1.0
    words: tuple[str, ...] = ("kept",)


def sent(count: int = 3) -> list[Reply[Up]]:
    return [Reply(f"s{i}", Up({"w": torch.tensor([1.0, -2.0]) * (i + 1), "b": torch.ones(2, 2)})) for i in range(count)]


def arrived(which: Faults, seed: int = 0, count: int = 3) -> list[Reply[Up]]:
    return list(which.inject(iter(sent(count)), seed))


def numbers(replies: list[Reply[Up]]) -> list[list[float]]:
    return [reply.body.delta["w"].tolist() for reply in replies]


def test_no_fault_leaves_replies_as_they_are() -> None:
    assert numbers(arrived(Faults())) == [[1.0, -2.0], [2.0, -4.0], [3.0, -6.0]]


def test_nan_strikes_only_the_silos_named() -> None:
    found = arrived(Faults(nan=("s1",)))
    assert [reply.silo for reply in found] == ["s0", "s1", "s2"]
    assert all(math.isnan(x) for x in numbers(found)[1])
    assert bool(found[1].body.delta["b"].isnan().all()), "every tensor"
    assert numbers(found)[::2] == [[1.0, -2.0], [3.0, -6.0]]
    assert found[1].body.weight == 1.0
    assert found[1].body.words == ("kept",)


def test_a_sign_flip_sends_the_opposite() -> None:
    assert numbers(arrived(Faults(sign_flip=("s0", "s2")))) == [[-1.0, 2.0], [2.0, -4.0], [-3.0, 6.0]]


def test_dropout_loses_the_share_asked_and_the_same_ones_again() -> None:
    found = [reply.silo for reply in arrived(Faults(dropout=0.3), count=1000)]
    assert 620 < len(found) < 780  # 700, five standard deviations of 14.5 apart
    assert found == [reply.silo for reply in arrived(Faults(dropout=0.3), count=1000)]
    assert found != [reply.silo for reply in arrived(Faults(dropout=0.3), seed=1, count=1000)]
    assert found == sorted(found, key=lambda name: int(name[1:]))
    assert arrived(Faults(dropout=1.0)) == []


def test_noise_has_the_deviation_asked_and_is_seeded() -> None:
    big = [Reply("s", Up({"w": torch.zeros(10_000)})) for _ in range(2)]

    def heard(seed: int) -> list[torch.Tensor]:
        return [reply.body.delta["w"] for reply in Faults(noise=0.5).inject(iter(big), seed)]

    one, two = heard(0)
    assert one.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(one.mean().item()) < 0.03
    assert not torch.equal(one, two), "each reply has noise of its own"
    assert torch.equal(one, heard(0)[0])
    assert not torch.equal(one, heard(1)[0])
    assert torch.equal(big[0].body.delta["w"], torch.zeros(10_000)), "what was sent is not changed"


def test_faults_work_together() -> None:
    found = arrived(Faults(nan=("s0",), sign_flip=("s1",)))
    assert all(math.isnan(x) for x in numbers(found)[0])
    assert numbers(found)[1] == [-2.0, 4.0]


def test_every_setting_has_its_function() -> None:
    for item in fields(Faults):
        assert callable(getattr(faults, item.name))


@pytest.mark.parametrize("settings", [{"dropout": 1.5}, {"dropout": -0.1}, {"noise": -1}, {"nan": 3}])
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Faults).validate_python(settings)
