"""What a study would cost, before it is run."""

from __future__ import annotations

from pathlib import Path

from fedtailor.study import conduct, estimate, measured
from tiny_studies import CLOSE, LOST, a_study


def test_bytes_and_runs_are_those_that_come(tmp_path: Path) -> None:
    study = a_study(CLOSE, LOST, seeds=(0,))
    told = estimate.of(study, tmp_path)
    assert [(name, cost.cells, cost.finished) for name, cost in told.items()] == [("close", 2, 0), ("lost", 1, 0)]
    assert all(cost.seconds > 0 and not cost.unknown for cost in told.values())
    conduct.conduct(study, tmp_path)
    rows = [one for one in measured.read(study, tmp_path) if one.part == "close"]
    sent = sum(one.figures["bytes_up"] for one in rows)
    # the untrained tensors come once besides, and a loss may have a digit more or less
    assert 0.8 * sent <= told["close"].up <= 1.05 * sent
    again = estimate.of(study, tmp_path)
    assert [(cost.cells, cost.finished, cost.seconds) for cost in again.values()] == [(0, 2, 0.0), (0, 1, 0.0)]


def test_methods_without_local_steps_are_told_by_finished_runs_of_their_part_or_not_at_all(tmp_path: Path) -> None:
    part = {"name": "words", "axes": {"method.keep": [2, 3]}, "set": {"method.name": "search", "method.calls": 60}}
    study = a_study(part, seeds=(0,))
    assert (told := estimate.of(study, tmp_path)["words"]).unknown == told.cells == 2
    conduct.conduct(a_study({**part, "axes": {"method.keep": [2]}}, seeds=(0,)), tmp_path)
    told = estimate.of(study, tmp_path)["words"]
    assert (told.cells, told.finished, told.unknown) == (1, 1, 0)
    assert told.seconds > 0
