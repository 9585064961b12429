"""Labels that are wrong on purpose: so many, the same ones for the same rows and seed, and never of test rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedtailor.data import Data, load
from fedtailor.rows import Row, mislabelled
from test_data import settings_for, split_rows, write

LABELS = ("bad", "fine", "good")
ROWS = [Row(f"row {i}", LABELS[i % 3], f"{i}") for i in range(300)]


def wrong(seed: int = 0, silo: str = "a", share: float = 0.4, rows: list[Row] = ROWS) -> dict[str, str]:
    found = mislabelled(rows, LABELS, share, seed, silo)
    assert [(row.prompt, row.id) for row in found] == [(row.prompt, row.id) for row in rows]
    return {new.id: new.answer for old, new in zip(rows, found, strict=True) if old.answer != new.answer}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.001, 0), (0.4, 120), (0.5, 150), (1.0, 300)])
def test_so_many_labels_are_replaced_by_another(share: float, count: int) -> None:
    assert len(wrong(share=share)) == count


def test_each_other_label_is_as_likely() -> None:
    found = wrong(share=1.0)
    for label in LABELS:
        told = Counter(found[row.id] for row in ROWS if row.answer == label)
        assert label not in told
        assert all(25 < count < 75 for count in told.values())  # 50 of 100, five standard deviations of 5 apart
        assert len(told) == 2


def test_which_ones_depends_on_rows_and_seed_alone() -> None:
    assert wrong() == wrong(rows=ROWS[::-1])
    assert wrong() != wrong(seed=1)
    assert wrong() != wrong(silo="b")
    less, more = wrong(share=0.2), wrong(share=0.5)
    assert less.items() < more.items(), "more noise is the same noise and more of it"


def test_training_and_validation_labels_are_noisy_and_test_is_not(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", split_rows(each=20))
    clean, noisy = (load(settings_for(source, label_noise=share), {}, 0) for share in (0.0, 0.5))
    for name, rows in noisy.silos.items():
        for part, count in (("train", 10), ("val", 1), ("test", 0)):  # half of one is rounded up
            pairs = zip(getattr(clean.silos[name], part), getattr(rows, part), strict=True)
            assert sum(old.answer != new.answer for old, new in pairs) == count
    assert noisy.sha256 != clean.sha256
    assert load(settings_for(source, label_noise=0.5), {}, 0).sha256 == noisy.sha256
    assert load(settings_for(source, label_noise=0.5), {}, 1).sha256 != noisy.sha256
    apart = load(settings_for(source, label_noise=0.5), {"b": {"answer": "mood"}}, 0)
    assert apart.silos["a"] == noisy.silos["a"]
    assert [row.answer for row in apart.silos["b"].train] == [row.answer for row in clean.silos["b"].train], "it has no labels"


def test_noise_is_of_labels() -> None:
    with pytest.raises(ValueError, match="label_noise is of labels; set label, or remove it"):
        Data(source="x", template="{x}", answer="x", silo_column="x", label_noise=0.1)
