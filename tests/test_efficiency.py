"""What training costs, by hand: bytes per round and silo, bytes until a target, FLOPs, who is not beaten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.study.efficiency import coarse, costs, pareto, targets, told
from fedtailor.study.points import gather
from studies import accuracy, found, logged, study

PART = {"name": "cost", "asks": "efficiency", "rows": ["federated", "centralized"], "axes": {"method": ["prefix", "lora"]}}
NUMBERS = st.floats(0, 1) | st.integers(0, 3).map(float)


def figures(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any]:
    """Both end at 0.8 on validation; prefix is there after one round of two silos, lora after two of ten times the bytes."""
    each = 100 if at["method"] == "prefix" else 1000
    rounds = logged((50, 1, 0.5), (2 * each, 2, 0.8), (2 * each, 2, 0.7))
    if at["method"] == "lora":
        rounds = logged((50, 1, 0.5), (2 * each, 2, None), (2 * each, 2, 0.8 if seed else 0.6))
    if row == "centralized":
        rounds = logged((50, 1, 0.5), (each, 2, 0.8))
    up = sum(entry["bytes_up"] for entry in rounds)
    return {**accuracy(0.75), "rounds": rounds, "bytes_up": up, "bytes_down": up, "seconds": 5.0, "peak_memory_mb": 700,
            "best_round": 1 if at["method"] == "prefix" or row == "centralized" else 2}  # fmt: skip


def test_costs_by_hand() -> None:
    one = study(PART, seeds=(0, 1))
    points = gather(one, one.parts[0], found(one, figures))
    prefix, _, lora, _ = costs(points, 0.95)
    assert (prefix.row, prefix.at) == ("federated", {"method": "prefix"})
    assert prefix.up_each.mean == 100  # 200 bytes of two silos in each of two rounds; round 0 is none
    assert (prefix.up.mean, prefix.bytes.mean) == (450, 900)
    assert prefix.until == {0: (500, 3), 1: (500, 3)}  # (50 + 200) up and as many down, until 0.8 >= 0.95 x 0.8
    assert lora.until == {0: None, 1: (2 * 4050, 5)}
    assert (lora.never, lora.spent(0).n, lora.spent(0).mean) == (1, 1, 8100)
    assert prefix.energy.n == 0
    assert prefix.flops["measured"].n == 0


def test_the_target_is_the_same_for_all_that_are_compared() -> None:
    one = study({**PART, "rows": ["federated"]}, seeds=(1,))
    points = gather(one, one.parts[0], found(one, lambda at, row, seed: {
        **accuracy(0.5), "best_round": 1, "rounds": logged((1, 1, 0.9), (1, 1, 0.4 if at["method"] == "lora" else 0.6)),
    }))  # fmt: skip
    assert targets(points, 0.5) == {("", 1): 0.3}  # the best final one, of the round that is served


def test_a_loss_is_aimed_at_from_above() -> None:
    def losing(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any]:
        rounds = [{"round": i, "bytes_up": 10, "bytes_down": 0, "seconds": 1, "val": {"loss": {"mean": loss}}}
                  for i, loss in enumerate((2.0, 1.05, 1.0))]  # fmt: skip
        return {"loss": {"mean": 1.0}, "rounds": rounds, "best_round": 2}

    one = study({**PART, "rows": ["federated"], "axes": {}}, seeds=(0,))
    points = gather(one, one.parts[0], found(one, losing))
    assert targets(points, 0.9) == {("", 0): pytest.approx(1 / 0.9)}
    assert costs(points, 0.9)[0].until == {0: (20, 2)}
    assert costs(points, 1.0)[0].until == {0: (30, 3)}


def test_flops_are_those_of_all_steps() -> None:
    one = study({**PART, "axes": {}}, seeds=(0,))
    there = found(one, lambda at, row, seed: 0.5)
    for each in there:
        object.__setattr__(each, "flops", {"estimated_step": 4.0, "measured_step": 5, "steps": 10})
    points = gather(one, one.parts[0], there)
    assert costs(points, 0.95)[0].flops["estimated"].mean == 40
    assert costs(points, 0.95)[0].flops["measured"].mean == 50
    assert any("0.80 to 0.80 of those counted, over 1 points" in said.text for said in told(one, points))


def test_what_is_said() -> None:
    one = study(PART, seeds=(1, 2, 3))
    points = gather(one, one.parts[0], found(one, figures))
    front, reached, least = told(one, points)
    assert "than method prefix (900 B, 0.750)." in front.text  # lora is as good, for more bytes
    assert "95 % of the best centralized validation accuracy is reached by method prefix with 500 B and 3.0 s" in reached.text
    assert "method lora (16.20 times as many, with every seed)" in least.text
    assert least.holds
    never = list(told(one, gather(one, one.parts[0], found(one, lambda at, row, seed: {
        **figures(at, row, seed), **({"rounds": logged((1, 1, 0.1))} if row == "federated" else {})}))))  # fmt: skip
    assert any("method prefix never, in 3 seeds" in said.text for said in never)


def test_how_finely_the_target_is_known_is_said() -> None:
    """Validated after rounds 2, 4 and 5: whether it was reached in between is not known."""
    log = logged((1, 1, None), (1, 1, None), (1, 1, 0.5), (1, 1, None), (1, 1, 0.6), (1, 1, 0.7))
    one = study(PART, seeds=(0, 1, 2))
    points = gather(one, one.parts[0], found(one, lambda at, row, seed: {
        **figures(at, row, seed), "rounds": log, "bytes_up": 5 + seed, "bytes_down": 5, "best_round": 5}))  # fmt: skip
    assert coarse(points, costs(points, 0.95)) == "validated every 2 rounds, so known no finer"
    _, reached, least = told(one, points)
    assert reached.text.endswith("; validated every 2 rounds, so known no finer.")
    assert least.text.endswith("; validated every 2 rounds, so known no finer.")


def test_nothing_is_sent_where_all_rows_are_in_one_place() -> None:
    one = study({**PART, "rows": ["centralized"]}, seeds=(0, 1, 2))
    points = gather(one, one.parts[0], found(one, figures))
    prefix, _ = costs(points, 0.95)
    assert [told.n for told in (prefix.up_each, prefix.down_each, prefix.up, prefix.down, prefix.bytes)] == [0] * 5
    assert (prefix.spent(0).n, prefix.spent(1).mean) == (0, 3)
    (reached,) = told(one, points)  # no front and no ratio of bytes
    assert reached.text.endswith("is reached by method prefix with 3.0 s; method lora with 3.0 s.")


def test_pareto_by_hand() -> None:
    """Cheap and bad; dear and good; beaten in both; as good as the second for more; no figure."""
    points = [(1, 0.1), (5, 0.9), (6, 0.5), (7, 0.9), (0, float("nan"))]
    assert pareto(points) == [0, 1]
    assert pareto([(1, 0.5), (1, 0.5)]) == [0, 1]
    assert pareto([(1, 0.5), (2, 0.4), (3, 0.6)], "lower") == [0, 1]
    assert pareto([]) == []


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
def test_pareto_leaves_none_that_is_beaten_and_covers_all(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    assert front
    for cost, quality in points:
        assert any(points[i][0] <= cost and points[i][1] >= quality for i in front)
    for i in front:
        assert not any(c < points[i][0] and q > points[i][1] for c, q in points)
