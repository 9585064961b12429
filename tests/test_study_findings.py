"""What a study says of itself: each sentence from figures whose answer is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.study import robustness
from fedtailor.study.compare import interval
from fedtailor.study.findings import Finding, findings
from fedtailor.study.grid import Study
from fedtailor.study.points import gather
from fedtailor.study.robustness import since
from fedtailor.study.tables import as_csv, as_latex, tables
from fedtailor.study.wording import comparative, listed, p_value, with_interval
from studies import accuracy, found, logged, nothing, study

JITTER = (-0.004, 0.0, 0.004)  # what seeds differ by beside their own level
ROWS = ["zero_shot", "alone", "federated", "centralized"]


def performance(apart: Mapping[str, float], seeds: tuple[int, ...] = (0, 1, 2), **part: Any) -> list[Finding]:
    """Rows that far from 0.7, each seed at its own level, with a jitter that is not shared with federated."""
    one = study({"name": "main", "asks": "performance", "rows": ROWS, **part}, seeds=seeds)

    def levels(at: Mapping[str, Any], row: str, seed: int) -> float | None:
        return 0.7 + 0.05 * seed + apart[row] + (JITTER[seed] if row != "federated" else 0) if row in apart else None

    return findings(one, found(one, levels))


def said(told: list[Finding], words: str) -> Finding:
    """The only one with these words."""
    matching = [one for one in told if words in one.text]
    assert len(matching) == 1, [one.text for one in told]
    return matching[0]


def test_close_to_centralized() -> None:
    """0.01 worse, deviation of 0.004 over three seeds: t = (0.02 - 0.01) / (0.004 / sqrt 3) = 4.33, p = .025."""
    close = said(performance({"federated": 0.0, "centralized": 0.01, "alone": -0.1}), "centralized:")
    assert close.text.startswith("Federated is at most 2.0 points worse than centralized: accuracy 0.750 against 0.760, 98.7 %")
    assert "1.0 points worse (95 % interval 0.0 to 2.0)." in close.text  # half: 4.30 x 0.004 / sqrt 3 = 0.0099
    t = 0.01 / (0.004 / math.sqrt(3))
    assert close.test.endswith(f"margin 2.0 points, {p_value(0.5 - t / (2 * math.sqrt(2 + t * t)))}")
    assert close.holds


def test_worse_than_centralized() -> None:
    far = said(performance({"federated": 0.0, "centralized": 0.1}), "than centralized:")
    assert far.text.startswith("Federated is more than 2.0 points worse than centralized")
    assert far.holds is False


def test_close_is_not_shown_by_no_difference() -> None:
    """0.018 worse: within the margin, but the test does not show it."""
    unsure = said(performance({"federated": 0.0, "centralized": 0.018}), "than centralized;")
    assert unsure.text.startswith("Not shown: that federated is at most 2.0 points worse")
    assert unsure.holds is None
    assert unsure.test.startswith("paired"), "tested, and neither is shown"


def test_better_than_alone_and_not_shown_against_zero_shot() -> None:
    told = performance({"federated": 0.0, "alone": -0.1, "zero_shot": 0.001})
    assert said(told, "alone").text.startswith("Federated is better than alone by 10.0 points (95 % interval 9.0 to 11.0)")
    zero = said(told, "that federated differs from zero-shot")
    assert "0.1 points worse (95 % interval -0.9 to 1.1)" in zero.text
    assert zero.holds is None
    assert zero.test.startswith("paired")
    assert "no difference" not in " ".join(one.text for one in told)
    assert said(told, "centralized has no seed in common").holds is None
    assert said(told, "3 of 3 runs are not finished").text.count("centralized") == 3


def test_one_seed_claims_nothing() -> None:
    told = performance({"federated": 0.0, "alone": -0.1, "zero_shot": -0.2, "centralized": 0.001}, seeds=(0,))
    tested = [one for one in told if one.test.startswith("paired")]
    assert not tested
    assert all(one.holds is None for one in told)
    assert "with one seed it is 9.6 points" not in said(told, "alone").text  # the jitter of seed 0 is -0.004
    assert "with one seed it is 10.4 points better" in said(told, "alone").text


def test_two_seeds_that_agree_claim_nothing() -> None:
    """Every difference is the same with both seeds: no test, whichever question is asked."""
    rows = {"zero_shot": 0.2, "alone": 0.5, "federated": 0.7, "centralized": 0.7}
    one = study({"name": "main", "asks": "performance", "rows": ROWS, "axes": {"method": ["prefix", "lora"]}}, seeds=(0, 1))
    told = findings(one, found(one, lambda at, row, seed: rows[row] - 0.1 * (at["method"] == "lora")))
    told += robust(lambda at, row, seed: 0.8 - at["dropout"] * (1 + (at["method"] == "lora")), seeds=(0, 1),
                   axes={"method": ["prefix", "lora"], "dropout": [0.0, 0.3]})  # fmt: skip
    told += robust(lambda at, row, seed: attacked(at, row, 1), seeds=(0, 1), **ATTACKED)
    tested = [one for one in told if "means over" not in one.test]
    assert len(tested) == 2 * 3 + 1 + 2 + 1 + 3
    assert {one.test for one in tested} == {"none: 2 seeds, no spread between them"}
    assert {one.holds for one in tested} == {None}
    assert all("not shown" in one.text.lower() for one in tested)


def test_three_seeds_that_agree_are_told_of() -> None:
    told = robust(lambda at, row, seed: 0.8 - at["dropout"], axes={"dropout": [0.0, 0.3]})
    assert [one.test.rpartition(": ")[2] for one in told] == [
        "p < .001 (no spread between them) at 0.3", "p = 1 (no spread between them) at 0.3"]  # fmt: skip
    (first, *_) = robust(lambda at, row, seed: attacked(at, row, 1), **ATTACKED)
    assert first.test.count("(no spread between them)") == 6


def test_methods_against_each_other() -> None:
    """Three pairs. prefix and ia3 are 0.001 apart; lora is far from both."""
    levels = {"prefix": 0.5, "lora": 0.7, "ia3": 0.501}
    one = study({"name": "main", "asks": "performance", "axes": {"method": [*levels]}})
    told = findings(one, found(one, lambda at, row, seed: levels[at["method"]] + JITTER[seed] * (at["method"] == "lora")
                               - JITTER[seed] * (at["method"] == "ia3")))  # fmt: skip
    better = said(told, "Method prefix is worse than lora by 20.0 points")
    assert "(Holm over 3)" in better.test
    assert said(told, "Method lora is better than ia3").holds
    unsure = said(told, "Not shown: a difference of method prefix from ia3")
    assert (unsure.holds, unsure.test[:6]) == (None, "paired")


def robust(level: Any, seeds: tuple[int, ...] = (0, 1, 2), choice: Any = None, **part: Any) -> list[Finding]:
    one = study({"name": "hard", **part}, seeds=seeds, choice=choice or {})
    return findings(one, found(one, level))


def test_from_where_on_quality_is_lost() -> None:
    lost = {0.0: 0.0, 0.1: 0.001, 0.3: 0.1, 0.5: 0.3}
    told = robust(lambda at, row, seed: 0.8 - lost[at["dropout"]] + JITTER[seed] * (at["dropout"] > 0) * (1 + at["dropout"]),
                  axes={"dropout": [*lost]})  # fmt: skip
    worse, kept = told
    assert worse.text.startswith("Federated accuracy is worse from dropout 0.3 on; at dropout 0.5 it is 30.0 points worse")
    assert "from 0.800 at dropout 0" in worse.text
    assert worse.test.startswith("paired two-sided t over 3 seeds against dropout 0, Holm over 3: ")
    assert worse.holds
    assert "less than 2.0 points worse at dropout 0.1 (0.1 points worse, 95 % interval " in kept.text
    assert "not shown at dropout 0.3 and 0.5" in kept.text
    assert kept.holds


@pytest.mark.parametrize(
    ("lost", "apart", "shown"),
    [
        (0.03, 0.01, "is 3.0 points worse (95 % interval"),  # two-sided: t = 3 sqrt 3, p = .035
        (0.009, 0.005, "is less than 2.0 points worse at dropout 0.5 (0.9 points worse"),  # one-sided: t = 2.2 sqrt 3, p = .031
    ],
)
def test_a_drop_shown_alone_is_not_shown_as_one_of_two(lost: float, apart: float, shown: str) -> None:
    """p is between .025 and .05: alone below 5 %, by Holm over two above it."""

    def level(at: Mapping[str, Any], row: str, seed: int) -> float:
        return 0.8 - (lost + apart * (seed - 1)) * bool(at["dropout"])

    assert said(robust(level, axes={"dropout": [0.0, 0.5]}), shown).holds
    told = robust(level, axes={"dropout": [0.0, 0.3, 0.5]})
    assert [(one.holds, one.test[:6]) for one in told] == [(None, "paired")] * 2


@pytest.mark.parametrize(
    ("lost", "apart", "alone", "of_two"),
    [
        (0.009, 0.005, "is less than 2.0 points worse with", "not shown whether accuracy is less"),
        (0.042, 0.01, "is more than 2.0 points worse with", "not shown whether accuracy is less"),
        (0.222, 0.01, "collapses", "is more than 2.0 points worse with"),  # half of the lead over zero-shot is 0.2
    ],
)
def test_an_aggregate_shown_alone_is_not_shown_as_one_of_two(lost: float, apart: float, alone: str, of_two: str) -> None:
    """Each is 2.2 deviations beyond what is asked: t = 2.2 sqrt 3, one-sided p = .031, by Holm over two .063."""

    def level(at: Mapping[str, Any], row: str, seed: int) -> float:
        return 0.5 if row == "zero_shot" else 0.9 - (lost + apart * (seed - 1)) * bool(at["attackers"])

    choice = {**nothing("attackers", 0, 2), **nothing("aggregate", "mean")}
    first, *_ = robust(level, axes={"aggregate": ["mean"], "attackers": [0, 2]}, rows=["zero_shot", "federated"], choice=choice)
    assert alone in first.text
    first, *_ = robust(level, **ATTACKED)
    assert of_two in first.text.lower()
    assert alone not in first.text.partition("whether")[0]


def test_no_drop_is_never_claimed() -> None:
    told = robust(lambda at, row, seed: 0.8 + JITTER[seed] * (at["dropout"] > 0), axes={"dropout": [0.0, 0.3]})
    assert told[0].text.startswith("Not shown: that federated accuracy gets worse along dropout")
    assert (told[0].holds, told[0].test[:6]) == (None, "paired")
    assert told[1].holds  # what can be shown: less than the margin is lost


def test_a_loss_that_rises_is_a_drop() -> None:
    told = robust(lambda at, row, seed: {"loss": {"mean": 0.5 + at["dropout"] + JITTER[seed] * at["dropout"]}},
                  axes={"dropout": [0.0, 0.3]}, metric="loss")  # fmt: skip
    assert told[0].text.startswith("Federated loss is 0.300 worse")


def test_a_metric_without_direction_is_not_judged() -> None:
    one = study({"name": "hard", "axes": {"dropout": [0.0, 0.3]}})
    there = found(one, lambda at, row, seed: {"odd": {"mean": at["dropout"]}})
    told = [*robustness.told(one, replace(gather(one, one.parts[0], there), metric="odd"))]
    assert "whether higher or lower is better is not known" in told[0].text
    assert [one.holds for one in told] == [None]


@pytest.mark.parametrize(
    ("sides", "worse", "expected"),
    [
        ([["b", "c", "d"]], ["c", "d"], "from x c on"),
        ([["b", "c", "d"]], ["d"], "at x d"),
        ([["b", "c", "d"]], ["b", "d"], "at x b and at x d"),
        ([["b"], ["d", "e"]], ["b", "d", "e"], "at x b and from x d on"),
    ],
)
def test_since_when(sides: list[list[Any]], worse: list[Any], expected: str) -> None:
    assert since("x", sides, worse, ["b", "c", "d", "e"]) == expected


ATTACKED = {
    "axes": {"aggregate": ["mean", "median"], "attackers": [0, 2]}, "rows": ["zero_shot", "federated"],
    "choice": {**nothing("attackers", 0, 2), **nothing("aggregate", "mean", "median")},
}  # fmt: skip


def attacked(at: Mapping[str, Any], row: str, seed: int) -> float:
    """Zero-shot 0.5; 0.9 without attackers; with them mean falls to 0.6 and median to 0.895."""
    if row == "zero_shot":
        return 0.5
    fallen = {"mean": 0.6, "median": 0.895}[at["aggregate"]] if at["attackers"] else 0.9
    return fallen + JITTER[seed] * bool(at["attackers"])


def test_which_aggregates_hold_and_which_collapse() -> None:
    first, *others = robust(attacked, **ATTACKED)
    assert first.text.startswith("Attackers 2: federated accuracy is less than 2.0 points worse with median (0.5 points worse, ")
    assert "it collapses (more than half of its lead over zero-shot is lost) with mean (30.0 points worse" in first.text
    assert "against the same aggregate at attackers 0; less than 2.0 points worse, Holm over 2: " in first.test
    assert first.holds
    assert len(others) == 2  # of each aggregate: worse or not


def test_what_learns_nothing_without_attackers_is_not_called_robust() -> None:
    """Krum is at 0.55 with and without attackers: of the mean's lead over zero-shot, 0.9 - 0.5, that is an eighth."""

    def level(at: Mapping[str, Any], row: str, seed: int) -> float:
        return 0.55 + JITTER[seed] if row == "federated" and at["aggregate"] == "krum" else attacked(at, row, seed)

    names = ("mean", "median", "krum")
    choice = {**nothing("attackers", 0, 1, 2), **nothing("aggregate", *names)}
    told = robust(level, **{**ATTACKED, "axes": {"aggregate": [*names], "attackers": [0, 1, 2]}, "choice": choice})
    apart = [one for one in told if "krum: accuracy is 0.550, against 0.900 with mean" in one.text]
    assert len(apart) == 1  # not once for each number of attackers
    assert apart[0].text.startswith("Attackers 0: not asked of krum: ")
    assert (apart[0].holds, "Holm over 2, p " in apart[0].test) == (None, True)
    hold = said(told, "Attackers 2: federated accuracy is less than 2.0 points worse with median (")
    assert "krum" not in hold.text + hold.test


def test_a_floor_that_is_higher_makes_no_collapse_of_it() -> None:
    """From 0.9 to 0.6 with zero-shot at 0.2: 0.3 of 0.7 is lost, less than half."""
    first, *_ = robust(lambda at, row, seed: 0.2 if row == "zero_shot" else attacked(at, row, seed), **ATTACKED)
    assert "collapses" not in first.text
    assert "it is more than 2.0 points worse with mean (30.0 points worse" in first.text


def test_without_a_point_of_no_attackers_mean_is_the_reference() -> None:
    part = {**ATTACKED, "axes": {"attackers": [1, 2], "aggregate": ["mean", "median"]}, "along": "attackers"}
    part["choice"] = {**nothing("attackers", 1, 2), **nothing("aggregate", "mean", "median")}
    levels = {("mean", 1): 0.9, ("mean", 2): 0.4, ("median", 1): 0.7, ("median", 2): 0.9}
    told = robust(lambda at, row, seed: levels[at["aggregate"], at["attackers"]] + JITTER[seed] * (at["attackers"] == 2), **part)
    hard = said(told, "Attackers 2: federated accuracy is less")
    assert "worse with median (0.0 points apart, " in hard.text  # against mean at 1 attacker, not median's own 0.7
    assert "against attackers 1, aggregate mean" in hard.test
    assert "mean" not in said(told, "Attackers 1: federated accuracy is more").text  # mean there is the reference itself


def test_how_often_a_backdoor_works_is_told_beside_the_accuracy() -> None:
    """Accuracy is untouched; the trigger brings its label about in 0.9, 0.95 and 1 of the rows with mean, never with median.
    Half of the interval: 4.302653 x 0.05 / sqrt 3 = 0.124."""

    def struck(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any]:
        success = {"attack_success": accuracy((0.9 + 0.05 * seed) * (at["aggregate"] == "mean"))["accuracy"]}
        return {**accuracy(0.9), **(success if at["attackers"] and row == "federated" else {})}

    told = said(robust(struck, **ATTACKED), "attack success")
    assert told.text == (
        "Attackers 2: federated attack success, of rows with the trigger and lower is better, is "
        "0.950 (95 % interval 0.826 to 1.074) with aggregate mean and 0.000 (with every seed) with aggregate median."
    )
    assert (told.test, told.holds) == ("none: means over 3 seeds", None)
    one = study({"name": "hard", **{k: v for k, v in ATTACKED.items() if k != "choice"}}, choice=ATTACKED["choice"])
    (table,) = [table for table in tables(one, found(one, struck)) if table.name == "hard-attack_success"]
    assert table.head == ("aggregate, attackers", "federated")
    assert [str(row[1]) for row in table.body] == ["0.950 ±0.124", "0.000 ±0.000"]
    assert "attack success, lower is better" in table.note
    itself = robust(struck, **ATTACKED, metric="attack_success")
    assert not any("with the trigger" in one.text for one in itself)
    assert not any("attack success" in one.text for one in robust(attacked, **ATTACKED))


def test_which_method_loses_least() -> None:
    """lora loses 0.1, prefix 0.3 at the value where both lose most."""
    steps = {"lora": 0.1, "prefix": 0.3}
    told = robust(lambda at, row, seed: 0.9 - (steps[at["method"]] + JITTER[seed] * (at["method"] == "lora")) * at["dropout"] * 2,
                  axes={"method": ["prefix", "lora"], "dropout": [0.0, 0.25, 0.5]})  # fmt: skip
    least = said(told, "Method lora loses less than prefix at dropout 0.5")
    assert "prefix 30.0 points (with every seed) and lora 10.0 points" in least.text
    assert least.holds


def test_unfinished_studies_say_what_is_there() -> None:
    assert all(one.holds is None for one in robust(lambda at, row, seed: None, **ATTACKED))
    for gone in ("mean", "median"):
        robust(lambda at, row, seed, gone=gone: None if at["aggregate"] == gone else 0.5 + seed / 10, **ATTACKED)
    half = robust(lambda at, row, seed: None if at["dropout"] and seed == 2 else 0.5 + at["dropout"] * seed,
                  axes={"dropout": [0.0, 0.3]})  # fmt: skip
    assert "2 seeds against" in half[0].test
    assert said(half, "1 of 6 runs").text.endswith("(dropout 0.3, seed 2: federated).")
    assert said(robust(lambda at, row, seed: 0.5 if at["dropout"] else None, axes={"dropout": [0.0, 0.3]}),
                "not there").holds is None  # fmt: skip


@pytest.fixture(scope="module")
def all_asks() -> Study:
    axes = {"method": ["prefix", "lora"], "aggregate": ["mean", "median"], "attackers": [0, 1, 2]}
    choice = {**nothing("attackers", 0, 1, 2), **nothing("aggregate", "mean", "median")}
    parts = [{"name": asks, "asks": asks, "rows": ROWS, "axes": axes} for asks in ("performance", "efficiency", "robustness")]
    return study(*parts, choice=choice, seeds=(0, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.9]))
def test_whatever_is_missing_nothing_breaks(all_asks: Study, seed: int, share: float) -> None:
    """Cells, rows, logs, the metric itself, spreads: any may be missing."""
    dice = random.Random(seed)

    def given_some(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any] | None:
        if dice.random() > share:
            return None
        value = dice.choice([0.5, 0.6, dice.random(), math.nan])
        rounds = logged((10, 1, dice.choice([None, value])), (10, 1, value)) if dice.random() < share else []
        figures = {} if dice.random() < 0.1 else accuracy(value)
        return {**figures, "bytes_up": dice.choice([0, 10]), "bytes_down": 5, "seconds": 1.0, "rounds": rounds}

    there = found(all_asks, given_some)
    for one in findings(all_asks, there):
        assert one.text.endswith(".")
        assert "nan" not in one.text + one.test
        assert one.holds is None or one.test.startswith("paired")
    for table in tables(all_asks, there):
        assert all(len(row) == len(table.head) for row in table.body)
        assert "nan" not in as_csv(table) + as_latex(table)


def test_words_for_numbers() -> None:
    assert [p_value(p) for p in (0.0123, 0.0004, 1.0, math.nan)] == ["p = .012", "p < .001", "p = 1", "no p"]
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert with_interval(interval({0: 0.01}), "accuracy") == "1.0 points"
    assert with_interval(interval({0: -0.0001, 1: 0.0001}), "accuracy").startswith("0.0 points (95 % interval -0.1 to 0.1)")
    assert comparative(interval({0: 0.25}), "loss", "lower") == "0.250 worse"
    assert comparative(interval({0: -0.25}), "odd", "") == "0.250 lower"


def test_a_part_without_any_figure_says_only_that() -> None:
    (only,) = robust(lambda at, row, seed: None, axes={"dropout": [0.0, 0.3]})
    assert (only.text, only.holds) == ("None of the 6 runs is finished.", None)
