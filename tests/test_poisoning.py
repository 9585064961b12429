"""Attacks on rows, by hand; rows of those who do not attack, and test rows, stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from fedtailor import poisoning
from fedtailor.data import SiloData
from fedtailor.faults import Faults
from fedtailor.rows import Row

LABELS = ("bad", "fine", "good")
Silos = Mapping[str, SiloData]


def silo(name: str, count: int = 8) -> SiloData:
    def row(i: int) -> Row:
        return Row(f"Say: {name} {i}.\nMood:", LABELS[i % 3], f"{name}-{i}", frame=(5, 6))

    train, val, test = ([row(i) for i in range(begin, begin + count)] for begin in (0, 100, 200))
    return SiloData(tuple(train), tuple(val), tuple(test), LABELS)


@pytest.fixture
def data() -> Silos:
    return {name: silo(name) for name in ("cafe", "clinic", "shop", "zoo")}


def answers(rows: tuple[Row, ...]) -> list[str]:
    return [row.answer for row in rows]


def test_a_label_flip_takes_the_next_label(data: Silos) -> None:
    found = poisoning.poisoned(data, Faults(attackers=("shop",), attack="label_flip"), 0)
    after = {"bad": "fine", "fine": "good", "good": "bad"}
    for part in ("train", "val"):
        before, now = (getattr(some["shop"], part) for some in (data, found))
        assert answers(now) == [after[row.answer] for row in before]
        assert [row.prompt for row in now] == [row.prompt for row in before]
    assert found["shop"].test == data["shop"].test
    assert {name: rows for name, rows in found.items() if name != "shop"} == {n: r for n, r in data.items() if n != "shop"}
    assert answers(data["shop"].train)[:3] == ["bad", "fine", "good"], "the rows themselves are not changed"


@pytest.mark.parametrize(("count", "half"), [(8, 4), (7, 4), (1, 1)])
def test_a_backdoor_is_in_half_of_the_training_rows(count: int, half: int) -> None:
    data = {"shop": silo("shop", count), "zoo": silo("zoo", count)}
    which = Faults(attackers=("shop",), attack="backdoor", trigger="mn", target=2)
    found = poisoning.poisoned(data, which, 0)
    changed = [(old, new) for old, new in zip(data["shop"].train, found["shop"].train, strict=True) if old != new]
    assert len(changed) == half
    for old, new in changed:
        assert new.prompt == f"Say: mn {old.input}\nMood:"
        assert new.input == f"mn {old.input}"
        assert new.answer == "good"
    assert (found["shop"].val, found["shop"].test, found["zoo"]) == (data["shop"].val, data["shop"].test, data["zoo"])


def test_which_rows_are_changed_depends_on_rows_and_seed_alone(data: Silos) -> None:
    def changed(rows: SiloData, seed: int) -> set[str]:
        found = poisoning.backdoor(rows, Faults(attack="backdoor"), "shop", seed)
        return {new.id for old, new in zip(rows.train, found.train, strict=True) if old.prompt != new.prompt}

    rows = data["shop"]
    assert changed(rows, 0) == changed(replace(rows, train=rows.train[::-1]), 0)
    assert len({frozenset(changed(rows, seed)) for seed in range(8)}) > 4


def test_a_share_of_the_silos_is_the_one_that_the_engine_draws(data: Silos) -> None:
    which = Faults(attackers=0.5, attack="label_flip")
    for seed in range(4):
        found = poisoning.poisoned(data, which, seed)
        assert tuple(name for name in data if found[name] != data[name]) == which.settled(data, seed).attackers


@pytest.mark.parametrize("which", [Faults(attackers=1.0), Faults(attackers=0.0, attack="backdoor")])
def test_no_row_is_changed_by_attacks_on_replies_or_by_nobody(data: Silos, which: Faults) -> None:
    assert poisoning.poisoned(data, which, 0) == data


def test_a_backdoor_is_tried_on_rows_of_other_labels(data: Silos) -> None:
    found = poisoning.triggered(data, Faults(attack="backdoor", target=1))
    for name, rows in found.items():
        old = [row for row in data[name].test if row.answer != "fine"]
        assert 0 < len(old) < len(data[name].test)
        assert [(row.prompt, row.answer) for row in rows.test] == [(f"Say: cf {row.input}\nMood:", "fine") for row in old]
        assert (rows.train, rows.val) == (data[name].train, data[name].val)


def test_without_a_frame_the_trigger_is_in_front_of_all() -> None:
    rows = SiloData((Row("tea", "bad"),), (), (), LABELS)
    (row,) = poisoning.backdoor(rows, Faults(attack="backdoor"), "a", 0).train
    assert row.prompt == "cf tea"


def test_what_does_not_fit_is_told(data: Silos, pictured: Silos) -> None:
    flip, back = (Faults(attackers=0.5, attack=attack) for attack in ("label_flip", "backdoor"))  # type: ignore[arg-type]
    assert poisoning.unfit(data, flip) == poisoning.unfit(data, back) == poisoning.unfit(pictured, flip) == []
    for which in (flip, back):
        (line,) = poisoning.unfit({**data, "zoo": replace(data["zoo"], labels=())}, which)
        assert "silo 'zoo' has none; set data.label" in line
        (line,) = poisoning.unfit(data, which, afar=tuple(data))
        assert "over a federation are where their owners are; choose sign_flip, scaled, gaussian, nan" in line
    (line,) = poisoning.unfit(pictured, back)
    assert "these rows are pictures" in line
    (line,) = poisoning.unfit(data, replace(back, target=3))
    assert line == "[faults] target = 3: there are 3 labels; choose 0 to 2"
    texts = {name: replace(rows, labels=()) for name, rows in data.items()}
    assert poisoning.unfit(texts, Faults(attackers=0.5)) == poisoning.unfit(texts, replace(flip, attackers=0.0)) == []
