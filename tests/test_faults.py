"""Faults strike replies, each in its own way, the same ones for the same seed."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedtailor.core import Reply
from fedtailor.errors import UserError
from fedtailor.faults import ON_ROWS, SENT, Faults
from fedtailor.tables import part
from fedtailor.tuned import norm

SOME = 'must be a share of the silos, 0 to 1, or a list of their names, as ["shop"]'
SILOS = [f"s{i}" for i in range(10)]


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
    found = arrived(Faults(attackers=("s1",), attack="nan"))
    assert [reply.silo for reply in found] == ["s0", "s1", "s2"]
    assert all(math.isnan(x) for x in numbers(found)[1])
    assert bool(found[1].body.delta["b"].isnan().all()), "every tensor"
    assert numbers(found)[::2] == [[1.0, -2.0], [3.0, -6.0]]
    assert found[1].body.weight == 1.0
    assert found[1].body.words == ("kept",)


def test_a_sign_flip_sends_the_opposite() -> None:
    assert numbers(arrived(Faults(attackers=("s0", "s2")))) == [[-1.0, 2.0], [2.0, -4.0], [-3.0, 6.0]]
    assert numbers(arrived(Faults(attackers=("s1",), strength=4.0)))[1] == [-8.0, 16.0]


def test_scaled_sends_as_many_times_as_much() -> None:
    found = arrived(Faults(attackers=("s1",), attack="scaled", strength=10.0))
    assert numbers(found) == [[1.0, -2.0], [20.0, -40.0], [3.0, -6.0]]


def test_gaussian_sends_noise_of_the_size_of_what_was_learnt() -> None:
    which = Faults(attackers=("s1", "s2"), attack="gaussian", strength=3.0)
    first, *noisy = arrived(which)
    assert torch.equal(first.body.delta["w"], torch.tensor([1.0, -2.0]))
    for reply, learnt in zip(noisy, sent()[1:], strict=True):
        assert norm(reply.body.delta) == pytest.approx(3 * norm(learnt.body.delta), rel=1e-5)
    one, two = (reply.body.delta["w"] / reply.body.delta["w"].norm() for reply in noisy)
    assert not torch.allclose(one, two, atol=1e-3), "each its own"
    assert numbers(noisy) == numbers(arrived(which)[1:])
    assert numbers(noisy) != numbers(arrived(which, seed=1)[1:])
    # what one silo sends does not depend on who else arrives
    assert numbers(list(which.inject(iter(sent()[2:]), 0)))[0] == numbers(noisy)[1]
    still = Reply("s1", Up({"w": torch.zeros(3)}))
    assert next(which.inject(iter([still]), 0)).body.delta["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("what", ["attackers", "slow"])
def test_a_share_is_of_silos_that_the_seed_draws(what: str) -> None:
    def drawn(share: Any, silos: list[str] = SILOS, seed: int = 0) -> tuple[str, ...]:
        return getattr(Faults(**{what: share}).settled(silos, seed), what)  # type: ignore[no-any-return]

    assert [len(drawn(share)) for share in (0.0, 0.04, 0.05, 0.2, 0.25, 1.0)] == [0, 0, 1, 2, 3, 10]  # halves are rounded up
    assert set(drawn(0.3)) < set(SILOS)
    assert drawn(0.3) == drawn(0.3, SILOS[::-1]), "whatever their order"
    assert len({drawn(0.3, seed=seed) for seed in range(10)}) > 5
    assert drawn(("s7", "elsewhere")) == ("s7", "elsewhere"), "names are as they were given"
    once = Faults(attackers=0.3, slow=0.3).settled(SILOS, 0)
    assert once.settled(SILOS, 1) == once


def test_attackers_and_slow_silos_are_drawn_apart() -> None:
    both = [Faults(attackers=0.3, slow=0.3).settled(SILOS, seed) for seed in range(5)]
    assert any(one.attackers != one.slow for one in both)


def test_a_share_that_is_of_no_silo_yet_strikes_none_in_silence() -> None:
    with pytest.raises(ValueError, match="settled"):
        arrived(Faults(attackers=0.5))


def test_silos_are_checked() -> None:
    Faults(attackers=0.05, slow=("s1",)).check(SILOS)
    with pytest.raises(UserError, match=r"\[faults\] attackers: the data has no silo 's10'; did you mean 's1"):
        Faults(attackers=("s10",)).check(SILOS)
    with pytest.raises(UserError, match=r"\[faults\] slow = 0.04 of 10 silos is none; choose 0.05 or more, or name them"):
        Faults(slow=0.04).check(SILOS)


def test_late_replies_are_ignored_and_named() -> None:
    which = Faults(deadline=1.0)
    missing: dict[str, str] = {}
    found = list(which.inject(iter(sent(1000)), 0, missing))
    assert 420 < len(found) < 580  # the median is 1: 500, five standard deviations of 15.8 apart
    assert len(found) + len(missing) == 1000
    assert set(missing.values()) == {"later than the deadline (faults.deadline = 1)"}
    assert [reply.silo for reply in found] == [reply.silo for reply in arrived(which, count=1000)]
    assert [reply.silo for reply in found] != [reply.silo for reply in arrived(which, count=1000, seed=1)]
    # sigma 0.25: above exp(2.5 sigma) 0.6 of 100, whoever else was asked
    assert len(arrived(Faults(deadline=math.exp(0.625)), count=1000)) == pytest.approx(994, abs=5 * 2.5)
    assert [reply.silo for reply in which.inject(iter(sent(1000)[500:]), 0)] == [r.silo for r in found if int(r.silo[1:]) >= 500]


def test_the_slow_are_late_more_often() -> None:
    slow = tuple(f"s{i}" for i in range(500))
    found = [int(reply.silo[1:]) for reply in arrived(Faults(slow=slow, slowness=3.0, deadline=2.0), count=1000)]
    # ln 2 is 2.77 sigma above a usual silo's median, and ln(2 / 3) 1.62 sigma below a slow one's: 0.997 and 0.052
    assert 480 < sum(i >= 500 for i in found) <= 500
    assert 5 < sum(i < 500 for i in found) < 51
    assert len(arrived(Faults(slow=slow, slowness=3.0), count=1000)) == 1000, "without a deadline all are waited for"


def test_a_round_takes_as_long_as_its_slowest_or_until_the_deadline() -> None:
    assert Faults().waited(SILOS, 0) == Faults(deadline=2.0).waited([], 0) == 0.0
    each = [Faults(slow=("s3",)).waited([silo], 0) for silo in SILOS]
    assert Faults(slow=("s3",)).waited(SILOS, 0) == max(each) == each[3]
    assert each[3] == pytest.approx(4 * Faults(slow=("s3",), slowness=1.0).waited(["s3"], 0))
    assert Faults(slow=("s3",), deadline=1.5).waited(SILOS, 0) == 1.5
    assert Faults(deadline=50.0).waited(SILOS, 0) == max(Faults(deadline=50.0).waited([silo], 0) for silo in SILOS)
    usual = [Faults(deadline=50.0).waited(["a"], seed) for seed in range(400)]
    assert statistics.median(usual) == pytest.approx(1.0, abs=0.08)
    assert statistics.stdev(map(math.log, usual)) == pytest.approx(0.25, abs=0.05)


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
    attacked = Faults(attackers=tuple(f"s{i}" for i in range(0, 1000, 2)), dropout=0.3)
    found = arrived(attacked, count=1000)
    assert [reply.silo for reply in found] == [reply.silo for reply in arrived(Faults(dropout=0.3), count=1000)]
    for reply in found:
        i = int(reply.silo[1:])
        assert reply.body.delta["w"][0].item() == (-1 if i % 2 == 0 else 1) * (i + 1)
    late = Faults(attackers=("s1",), dropout=0.3, deadline=1.0)
    kept = {reply.silo for reply in arrived(late, count=1000)}
    assert kept == {r.silo for r in found} & {r.silo for r in arrived(Faults(deadline=1.0), count=1000)}


def test_every_attack_is_on_replies_or_on_rows() -> None:
    assert {*SENT, *ON_ROWS} == set(get_args(get_type_hints(Faults)["attack"]))
    assert numbers(arrived(Faults(attackers=("s1",), attack="label_flip"))) == numbers(arrived(Faults())), "these are on rows"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attackers": "shop"}, f"attackers: {SOME}, not 'shop'"),
        ({"attackers": 1.5}, f"attackers: {SOME}, not 1.5"),
        ({"slow": [1]}, f"slow: {SOME}, not [1]"),
        ({"attackers": True}, "attackers: must not be true or false, not True"),
        ({"attackers": [True]}, "attackers: must not be true or false, not [True]"),
        ({"nan": ["shop"]}, "has no setting 'nan'; write attackers = [...], attack = 'nan'"),
        ({"strength": 0}, "strength: Input should be greater than 0, not 0"),
        ({"strength": 2, "attack": "nan"},
         "strength is of sign_flip, scaled, gaussian; attack = 'nan' has none, so leave it out"),
        ({"trigger": "xy"}, "trigger and target are of backdoor; attack = 'sign_flip' has none, so leave them out"),
        ({"trigger": " ", "attack": "backdoor"}, "trigger must be a word, not empty"),
        ({"slowness": 0.5}, "slowness: Input should be greater than or equal to 1, not 0.5"),
        ({"deadline": 0}, "deadline: Input should be greater than 0, not 0"),
    ],
)
def test_a_table_that_is_wrong_is_told_in_one_line(settings: dict[str, Any], said: str) -> None:
    errors: list[str] = []
    assert part(Faults, settings, "[faults]", errors) is None
    assert [error.removeprefix("[faults] ").removeprefix(": ").removeprefix("[faults]: ") for error in errors] == [said]


def test_a_table_may_have_a_share_or_names() -> None:
    errors: list[str] = []
    assert part(Faults, {"attackers": ["a", "b"], "slow": 1}, "[faults]", errors) == Faults(attackers=("a", "b"), slow=1.0)
    assert part(Faults, {"attackers": 0.25, "slow": []}, "[faults]", errors) == Faults(attackers=0.25, slow=())
    assert part(Faults, {"attack": math.nan}, "[faults]", errors) == Faults(attack="nan"), "TOML's nan is a number"
    assert not errors


@pytest.mark.parametrize("settings", [{"dropout": 1.5}, {"dropout": -0.1}, {"noise": -1}, {"attackers": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Faults).validate_python(settings)
