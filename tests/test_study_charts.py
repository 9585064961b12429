"""Charts of made-up studies: what is drawn where, what the captions say, what may be missing."""

from __future__ import annotations

import itertools
import re
import sys
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

import studies
from fedtailor.errors import UserError
from fedtailor.study import charts, costs, marks, series
from fedtailor.study.charts import Chart, View
from fedtailor.study.points import gather
from fedtailor.study.series import Dimension
from shown_studies import HOSTILE, LONG, METHODS, everything

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Chart]:
    return {f"{chart.part}/{chart.name}": chart for chart in charts.charts(*everything(), "fedtailor study it.toml")}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def view(one: Any, found: Any) -> View:
    return View(one, found, gather(one, one.parts[0], found), "")


def test_each_kind_of_part_has_its_charts(drawn: dict[str, Chart]) -> None:
    assert set(drawn) == {
        "methods/quality", "cost/against-bytes", "cost/against-seconds", "cost/learning", "skew/along-alpha",
        "attacks/along-attackers", f"names/along-{LONG.replace(' ', '-')[:40]}", "once/along-dropout",
    }  # fmt: skip


def test_a_chart_tells_its_axes_lines_seeds_and_machine(drawn: dict[str, Chart]) -> None:
    chart = drawn["methods/quality"]
    for svg in (chart.svg, chart.column):
        assert {"zero-shot", "alone", "federated", "centralized", "prefix", "ensemble"} <= set(texts(svg))
    assert "accuracy (all test rows), higher is better" in texts(chart.svg)
    assert "Seeds 0, 1, 2." in chart.caption
    assert "Part methods: model tiny" in chart.caption
    assert "Command: fedtailor study it.toml." in chart.caption
    assert "lora: zero-shot 0.510, alone 0.710, federated 0.810, centralized 0.830" in chart.alt
    assert f'aria-label="{chart.alt[:20]}' in chart.svg
    assert chart.png.startswith(b"\x89PNG")


def test_one_seed_has_no_interval_and_says_so(drawn: dict[str, Chart]) -> None:
    assert "One seed (0), so no intervals." in drawn["once/along-dropout"].caption


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda at, seed: "one", "the seeds; all on the same test rows."),
        (lambda at, seed: f"of {seed}", "the seeds; test rows are drawn anew by seed."),
        (lambda at, seed: f"of {at['method']}", "the seeds; test rows differ between points, not by seed alone."),
        (lambda at, seed: "one" if seed else "", "the seeds."),
    ],
)
def test_the_same_test_rows_are_claimed_only_where_they_are(rows: Any, said: str) -> None:
    one = studies.study({"name": "p", "asks": "performance", "axes": {"method": ["prefix", "lora"]}}, seeds=(0, 1))
    found = studies.found(one, lambda at, row, seed: {**studies.accuracy(0.5), "test_sha256": rows(at, seed)})
    (chart,) = charts.charts(one, found)
    assert said in chart.caption


def test_what_is_missing_is_counted(drawn: dict[str, Chart]) -> None:
    assert "3 of 48 results are missing and left out." in drawn["skew/along-alpha"].caption
    assert "missing" not in drawn["methods/quality"].caption
    assert charts.charts(everything()[0], []) == []


def test_values_over_a_wide_span_stand_on_a_logarithmic_axis(drawn: dict[str, Chart]) -> None:
    told = " ".join(texts(drawn["skew/along-alpha"].svg))
    assert "alpha of the Dirichlet split (smaller: silos differ more), logarithmic" in told
    places = series.places(Dimension("alpha", (100.0, 0.1, 1.0, 10.0)), "alpha").places
    assert [round(place, 9) for place in places.values()] == [0, round(1 / 3, 9), round(2 / 3, 9), 1]
    assert list(places) == [0.1, 1.0, 10.0, 100.0]


def test_other_numbers_stand_at_their_value_where_there_is_room() -> None:
    wide = series.places(Dimension("dropout", (0.0, 0.25, 1.0)), "dropout")
    assert (list(wide.places.values()), wide.label, wide.ordered) == ([0, 0.25, 1], "dropout", True)
    near = series.places(Dimension("dropout", (0.0, 0.01, 1.0)), "dropout")
    assert (list(near.places.values()), near.label) == ([0, 0.5, 1], "dropout, not to scale")
    names = series.places(Dimension("partition", ("natural", "iid")), "partition")
    assert (names.places, names.ordered) == ({"natural": 0, "iid": 1}, False)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9, unique=True))
def test_numbers_keep_their_order_on_paper(values: list[float]) -> None:
    told = series.places(Dimension("x", tuple(values)), "x")
    assert list(told.places) == sorted(values)
    where = list(told.places.values())
    assert (where[0], where[-1]) == (0, 1)
    assert all(a < b for a, b in itertools.pairwise(where))


@given(st.lists(st.integers(2, 12), max_size=3))
def test_lines_and_panels_hold_every_combination_once(sizes: list[int]) -> None:
    axes = [Dimension(f"axis {i}", tuple(range(size))) for i, size in enumerate(sizes)]
    lines, panels = series.split(axes, 8)
    assert len(lines) <= 8
    both = [tuple(sorted({**panel, **line}.items())) for panel in panels for line in lines]
    assert sorted(both) == sorted(tuple(sorted(at.items())) for at in series.combinations(axes))


def test_seven_aggregates_share_a_panel_for_each_attack(drawn: dict[str, Chart]) -> None:
    told = texts(drawn["attacks/along-attackers"].svg)
    assert "attack sign_flip" in told
    assert "number of silos that attack" in told
    assert told.count("lora") == 1, "in the one legend"


def test_the_front_is_named_and_a_row_without_a_federation_is_a_level(drawn: dict[str, Chart]) -> None:
    one = studies.study({"name": "cost", "asks": "efficiency", "rows": ["federated", "centralized"],
                         "axes": {"method": ["prefix", "lora", "full"]}})  # fmt: skip
    quality, moved = {"prefix": 0.7, "lora": 0.8, "full": 0.75}, {"prefix": 10, "lora": 20, "full": 30}
    found = studies.found(one, lambda at, row, seed: {
        **studies.accuracy(quality[at["method"]] if row == "federated" else 0.9), "seconds": 1.0,
        **dict.fromkeys(("bytes_up", "bytes_down"), moved[at["method"]]),  # of centralized, too: no cost of its own
    })  # fmt: skip
    mine = view(one, found)
    spots, levels = costs.spots(mine, costs.BYTES, *costs.looks_of(mine))
    assert [(s.name, s.cost, s.front) for s in spots] == [("prefix", 20, True), ("lora", 40, True), ("full", 60, False)]
    assert [(level.name, round(level.quality, 9)) for level in levels] == [("centralized", 0.9)]
    bold = re.findall(r'font-weight: 700[^>]*>([^<]*)<', drawn["cost/against-bytes"].svg)
    assert "lora" in bold
    assert {"1 MB", "10 MB"} <= set(texts(drawn["cost/against-bytes"].svg))
    for figure in found:
        figure.figures["test_sha256"] = figure.at["method"]  # type: ignore[index]
    assert not any(spot.front for spot in costs.spots(mine, costs.BYTES, *costs.looks_of(mine))[0])


def test_an_axis_of_costs_has_two_ticks_at_least_with_their_unit() -> None:
    one = studies.study({"name": "cost", "asks": "efficiency", "axes": {"method": ["prefix", "lora"]}})
    found = studies.found(one, lambda at, row, seed: {**studies.accuracy(0.5), "bytes_up": 12e3, "bytes_down": 0,
                                                      "seconds": 1.5 if at["method"] == "lora" else 1.7})  # fmt: skip
    told = {chart.name: texts(chart.svg) for chart in charts.charts(one, found)}
    assert {"1.5 s", "1.7 s"} <= set(told["against-seconds"])
    assert "12 kB" in told["against-bytes"]


def test_learning_curves_add_up_what_was_sent() -> None:
    one = studies.study({"name": "cost", "asks": "efficiency", "axes": {"method": ["prefix", "lora"]}}, seeds=(0, 1))
    log = (studies.logged((1, 1, 0.2), (10, 1, None), (10, 1, 0.6)), studies.logged((3, 1, 0.4), (10, 1, 0.5), (10, 1, 0.8)))
    found = studies.found(one, lambda at, row, seed: {**studies.accuracy(0.5), "bytes_up": 21, "bytes_down": 21,
                                                      "rounds": log[seed]} if at["method"] == "lora" else None)  # fmt: skip
    mine = view(one, found)
    (curves,) = costs.curves(mine, costs.looks_of(mine)[0])
    ((place, points),) = curves.series.items()
    assert place == 1
    assert points == [(4.0, pytest.approx(0.3), 0.2, 0.4), (44.0, pytest.approx(0.7), 0.6, 0.8)], "round 1 is not both seeds'"


def test_the_same_figures_give_the_same_bytes_and_leave_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    one = studies.study({"name": "p", "asks": "performance", "axes": {"method": ["prefix", "lora"]}})
    found = studies.found(one, lambda at, row, seed: 0.5 + 0.1 * seed)
    assert charts.charts(one, found) == charts.charts(one, found)
    assert dict(matplotlib.rcParams) == before


def test_a_drawing_may_stand_beside_others(drawn: dict[str, Chart]) -> None:
    all_of = [svg for chart in drawn.values() for svg in (chart.svg, chart.column)]
    seen: set[str] = set()
    for svg in all_of:
        ids = re.findall(r' id="([^"]*)"', svg)
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)
        assert not re.search(r"<style|<script|<metadata|<!--|\d{4}-\d\d-\d\dT", svg)


def test_nothing_is_set_smaller_than_nine_points(drawn: dict[str, Chart]) -> None:
    for chart in drawn.values():
        for svg, width in ((chart.svg, 7 * 72), (chart.column, 3.5 * 72)):
            assert float(ET.fromstring(svg).attrib["viewBox"].split()[2]) == width
            assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)) >= 9


def test_hostile_names_are_text(drawn: dict[str, Chart]) -> None:
    chart = next(chart for chart in drawn.values() if chart.part == "names")
    for svg in (chart.svg, chart.column):
        assert {element.tag.removeprefix(SVG) for element in ET.fromstring(svg).iter()} <= {
            "svg", "title", "desc", "g", "path", "text", "use", "defs", "clipPath", "rect", "tspan"}  # fmt: skip
        assert "\u202e" not in svg
        assert "\x07" not in svg
    assert any("<b>" in text for text in texts(chart.svg)), HOSTILE
    assert any("$x_" in text for text in texts(chart.svg)), "no formula"


def test_values_that_are_all_but_equal_are_not_torn_apart() -> None:
    one = studies.study({"name": "p", "axes": {"dropout": [0.0, 0.5]}})
    (chart,) = charts.charts(one, studies.found(one, lambda at, row, seed: 0.5 + 1e-9 * seed))
    shown = [float(text) for text in texts(chart.svg) if re.fullmatch(r"0\.\d{3,}", text)]
    assert max(shown) - min(shown) == pytest.approx(0.01, abs=0.003)


@given(st.text(max_size=120), st.integers(4, 40))
def test_what_is_wrapped_fits(text: str, width: int) -> None:
    lines = marks.wrapped(text, width).split("\n")
    assert len(lines) <= 3
    assert all(len(line) <= width for line in lines)


def test_wrapped_breaks_behind_underscores() -> None:
    assert marks.wrapped("scaled_replacement of it", 12) == "scaled_\nreplacement\nof it"


def test_looks_differ_without_colour() -> None:
    assert len({look.marker for look in marks.LOOKS}) == len({str(look.dash) for look in marks.LOOKS}) == 8
    rows = marks.looks_of(("zero_shot", "alone", "federated", "centralized", "routed", "noiseless"))
    assert len({look.marker for look in rows.values()}) == len({look.colour for look in rows.values()}) == 6
    assert len(METHODS) == len(marks.LOOKS)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"plots need fedtailor\[study\]: pip install 'fedtailor\[study\]'"):
        charts.charts(everything()[0], [])
