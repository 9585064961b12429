"""A study's tables: rounded and exact, of finished and unfinished studies, for LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor.study.compare import interval
from fedtailor.study.tables import Entry, Table, as_csv, as_latex, count, escaped, tables
from studies import accuracy, found, logged, nothing, study

MAIN = {"name": "main", "title": "Main result", "asks": "performance", "rows": ["alone", "federated", "centralized"],
        "axes": {"method": ["prefix", "lora"]}}  # fmt: skip


def given_main(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any]:
    value = {"alone": 0.4, "federated": 0.57, "centralized": 0.6}[row] + 0.1 * seed
    rounds = logged((50, 1, 0.2), (1000, 2, 0.6 if row == "federated" and at["method"] == "prefix" else 0.5))
    return {**accuracy(value), "bytes_up": 1050, "bytes_down": 1050, "seconds": 90.0, "peak_memory_mb": 700.0,
            "trained_parameters": 1800, "best_round": 1, **({"rounds": rounds} if row != "alone" else {})}  # fmt: skip


def shown(table: Table) -> list[list[str]]:
    return [[str(entry) for entry in row] for row in table.body]


def rows_of(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(as_csv(table))))


def test_of_performance() -> None:
    one = study(MAIN, seeds=(0, 1))
    quality, cost, compute = tables(one, found(one, given_main))
    assert (quality.name, cost.name, compute.name) == ("main", "main-cost", "main-compute")
    assert quality.head == ("method", "alone", "federated", "centralized", "of centralized")
    # 0.57 and 0.67: 12.706 x 0.05 on either side; 0.57 / 0.6 and 0.67 / 0.7
    assert shown(quality)[0][:3] == ["prefix", "0.450 ±0.635", "0.620 ±0.635"]
    assert shown(quality)[0][4].startswith("95.4 % ±")
    assert "accuracy, higher is better; over all test rows together" in quality.note
    assert "2 seeds (0, 1)." in quality.note


def test_of_costs() -> None:
    """Target 0.95 x 0.5: both rounds 1 are above, with 1050 bytes each way."""
    one = study(MAIN, seeds=(0, 1))
    _, cost, compute = tables(one, found(one, given_main))
    told = {row[0]: row for row in shown(cost)}
    assert told["prefix, federated"] == ["prefix, federated", "500 B", "500 B", "2.1 kB", "1.5 min", "2.1 kB", "3.0 s", "yes"]
    assert told["lora, centralized"] == ["lora, centralized", "–", "–", "–", "1.5 min", "–", "3.0 s", "–"]  # nothing is sent
    assert "– for bytes: nothing crosses a wire there." in cost.note
    assert "validated" not in cost.note
    (first, *_) = csv.DictReader(io.StringIO(as_csv(cost)))
    assert first["bytes to target seed 0"] == "2100.0"
    assert compute.head == ("method, row", "trained parameters", "peak memory")  # no column of what is not known
    assert shown(compute)[0] == ["prefix, federated", "1.8 k", "700 MB"]


def test_flops_are_counted_and_estimated() -> None:
    one = study(MAIN, seeds=(0,))
    told = found(one, given_main)
    assert "counted" not in tables(one, told)[2].note
    for each in told:
        object.__setattr__(each, "flops", {"estimated_step": 400.0, "measured_step": 300, "steps": 10})
    compute = tables(one, told)[2]
    assert compute.head[2:4] == ("FLOPs, estimated", "FLOPs, counted")
    assert shown(compute)[0][2:4] == ["4.0 k", "3.0 k"]
    assert "of 2 steps of 3 silos at most, times all steps" in compute.note


def test_a_target_that_is_not_reached() -> None:
    one = study({**MAIN, "rows": ["federated"]}, seeds=(0, 1))
    told = found(one, lambda at, row, seed: {**given_main(at, row, seed), "rounds": logged(
        (50, 1, 0.2), (1000, 2, 0.6 if at["method"] == "prefix" or seed else 0.5))})  # fmt: skip
    cost = tables(one, told)[1]
    assert shown(cost)[1][5:7] == ["2.1 kB (not reached in 1 of 2 seeds)", "3.0 s (not reached in 1 of 2 seeds)"]
    assert rows_of(cost)[1]["bytes to target seed 0"] == ""
    assert rows_of(cost)[1]["bytes to target seed 1"] == "2100.0"


def test_of_robustness() -> None:
    """Values along the line are rows; a star where the drop is shown."""
    part = {"name": "drop", "axes": {"method": ["prefix", "lora"], "dropout": [0.0, 0.3]}}
    one = study(part, seeds=(0, 1, 2))
    (table,) = tables(one, found(one, lambda at, row, seed: 0.8 + 0.01 * seed - (
        (0.2 + 0.001 * seed) * (at["method"] == "lora") * (at["dropout"] > 0))))  # fmt: skip
    assert table.head == ("dropout", "prefix", "lora")
    assert [row[0] for row in shown(table)] == ["0", "0.3"]
    assert [row[2][-1] == "*" for row in shown(table)] == [False, True]
    assert not any(row[1].endswith("*") for row in shown(table))
    assert "Columns: method. *: differs from dropout 0 (" in table.note


def test_many_combinations_are_cut_up() -> None:
    names = [f"n{i}" for i in range(4)]
    part = {"name": "drop", "rows": ["federated", "centralized"],
            "axes": {"attack": ["None at all", "flip"], "aggregate": names, "dropout": [0.0, 0.3]}}  # fmt: skip
    choice = {**nothing("attack", "None at all", "flip"), **nothing("aggregate", *names)}
    one = study(part, choice=choice)
    told = tables(one, found(one, lambda at, row, seed: 0.5))
    assert [table.name for table in told] == ["drop-none-at-all", "drop-none-at-all-centralized",
                                              "drop-flip", "drop-flip-centralized"]  # fmt: skip
    assert {table.head for table in told} == {("dropout", *names)}


def test_unfinished_studies() -> None:
    one = study(MAIN, {"name": "drop", "axes": {"dropout": [0.0, 0.3]}}, seeds=(0, 1))
    assert tables(one, []) == []

    def first(at: Mapping[str, Any], row: str, seed: int) -> dict[str, Any] | None:
        there = seed == 0 and at.get("method", "prefix") == "prefix" and not at.get("dropout") and row != "centralized"
        return given_main({"method": "prefix"}, row, seed) if there else None

    quality, cost, _, drop = tables(one, found(one, first))
    assert shown(quality) == [["prefix", "0.400", "0.570"]]  # one seed: no interval; no column without a figure
    assert "Not there yet: method prefix, seed 0: centralized; method prefix, seed 1: alone, federated, " in quality.note
    assert len(cost.body) == 1
    assert shown(drop) == [["0", "0.570"], ["0.3", "–"]]
    assert rows_of(drop)[0]["federated low"] == ""
    assert rows_of(drop)[0]["federated n"] == "1"


def test_pooled_figures_are_not_set_against_means_over_silos() -> None:
    """One row has no pooled figure: then all are taken over silos."""
    one = study({**MAIN, "axes": {}, "rows": ["alone", "federated"]}, seeds=(0,))
    told = found(one, lambda at, row, seed: {"accuracy": {"mean": 0.3, **({"pooled": 0.9} if row == "federated" else {})}})
    quality = tables(one, told)[0]
    assert shown(quality) == [["accuracy", "0.300", "0.300"]]
    assert "unweighted mean over silos" in quality.note


def test_exact_figures_come_back() -> None:
    values = {0: 0.1 + 0.2, 3: 1 / 3}
    table = Table("p", "p", "t", ("who", "value"), ((Entry('a "b", c'), Entry("0.3", interval(values))),), "")
    (row,) = rows_of(table)
    assert row["who"] == 'a "b", c'
    assert (float(row["value seed 0"]), float(row["value seed 3"])) == (0.1 + 0.2, 1 / 3)
    assert float(row["value low"]) == interval(values).low
    assert row["value n"] == "2"


def test_latex() -> None:
    table = Table("p", "p-1", "50 % & more_", ("a", "b"), ((Entry("x_1"), Entry("0.5 ±0.1")),), "±half; <5 %")
    text = as_latex(table)
    assert r"\caption{50 \% \& more\_}" in text
    assert "a & b \\\\\n\\midrule\nx\\_1 & 0.5 $\\pm$0.1 \\\\\n\\bottomrule" in text
    assert r"\begin{tabular}{lr}" in text
    assert r"\textless{}5 \%" in text
    assert escaped("a\n\n b\x00") == "a b\N{REPLACEMENT CHARACTER}"  # an empty line would end a caption


@given(st.text())
def test_nothing_in_a_text_is_a_command(text: str) -> None:
    """Without what the escapes themselves are made of, no sign is left that LaTeX acts on."""
    left = escaped(text)
    for sign in ("\\textbackslash{}", "\\textasciitilde{}", "\\textasciicircum{}", "\\textless{}", "\\textgreater{}",
                 "\\textbar{}", "\\textquotedbl{}", "$\\pm$", "$\\times$", "$\\uparrow$", "$\\downarrow$",
                 *("\\" + c for c in "&%$#_{}")):  # fmt: skip
        left = left.replace(sign, "")
    assert not set(left) & set("\\&%$#_{}~^")


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (999, "999"), (1800, "1.8 k"), (2.5e12, "2.5 T"), (3.4e15, "3.4e+15")]
)
def test_counts(value: float, expected: str) -> None:
    assert count(value) == expected
