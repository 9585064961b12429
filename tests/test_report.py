"""The report of a made-up run: the numbers, hostile text, what may be missing, several seeds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtailor import plots, report
from fedtailor.errors import UserError

SILOS = ("tweets", "movie_reviews")
SAMPLE = ("silo", "prompt", "answer", "generated")
HOSTILE = "<script>alert('x')</script> \"quoted\" & http://evil.example/x.png [bold]b[/bold] | \u202e \ud800 \x07"


def metric(*values: float, lower: bool = False) -> dict[str, Any]:
    worst = max(values) if lower else min(values)
    return {"mean": sum(values) / len(values), "worst": worst, "per_silo": dict(zip(SILOS, values, strict=True))}


def row(accuracy: tuple[float, float], loss: tuple[float, float], **more: Any) -> dict[str, Any]:
    samples = [{"silo": "tweets", "prompt": "What a day", "answer": "positive", "generated": "positive"}]
    return {
        "accuracy": metric(*accuracy), "loss": metric(*loss, lower=True), "bytes_up": 0, "bytes_down": 0,
        "seconds": 41.2, "peak_memory_mb": 900.0, "trained_parameters": 0, "samples": samples, **more,
    }


def a_result() -> dict[str, Any]:
    return {
        "version": 1, "name": "quickstart", "seeds": [0], "command": "fedtailor run experiments/quickstart.toml",
        "experiment": {"name": "quickstart", "method": {"name": "prefix", "local": {"steps": 8}}},
        "environment": {"python": "3.11.7", "device": "cpu"},
        "rows": {
            # Out of order on purpose: the tables have their own.
            "centralized": row((0.6, 0.8), (1.0, 1.2), trained_parameters=368_640, best_round=2, rounds=2),
            "federated": row((0.5, 0.88), (1.1, 1.3), bytes_up=11_796_480, bytes_down=999, evaluation_bytes_up=1234,
                             trained_parameters=368_640, best_round=0, rounds=2, rejected={"tweets: not finite": 2}),
            "alone": row((0.52, 0.66), (1.5, 1.7), own={"accuracy": metric(0.7, 0.64)}),
            "zero_shot": row((0.5, 0.58), (2.0, 3.0)),
        },
    }


def rounds(path: Path, *losses: float, torn: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"round": i, "val": {"loss": {"mean": loss}, "accuracy": {"mean": 1 / (1 + loss)}}}
               for i, loss in enumerate(losses)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + ('{"round": 9, "va' if torn else ""))


def a_run(folder: Path, result: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result or a_result()))
    (folder / "experiment.toml").write_text('name = "quickstart"\n')
    rounds(folder / "rounds.jsonl", 3.0, 2.0, 1.5)
    rounds(folder / "rows" / "federated" / "rounds.jsonl", 3.0, 2.0, 1.5, torn=True)
    rounds(folder / "rows" / "centralized" / "rounds.jsonl", 3.0, 1.9, 1.4)
    for silo in SILOS:
        rounds(folder / "rows" / "alone" / silo / "rounds.jsonl", 3.0, 2.2, 2.1)
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    config = {"base_model_name_or_path": str(Path.home() / "models" / "small"), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Page(HTMLParser):
    """The page taken apart: text, table cells by table id, tags, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self._table, self._cell = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("th", "td"):
            self.tables[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[self._table][-1][-1] += data.strip()


def page_of(folder: Path) -> Page:
    return Page(report.write(folder).read_text(encoding="utf-8"))


def in_terminal(result: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(report.table(result))
    return captured.get()


def test_the_sentence_compares_federated_with_the_rest() -> None:
    assert report.primary(a_result()) == "accuracy"
    assert report.summary(a_result()) == (
        "Federated customization (prefix) over 2 silos reaches accuracy 0.690; "
        "zero-shot 0.540, centralized 0.700, best silo alone 0.660."
    )


def test_page_shows_the_numbers_in_order(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path / "run"))
    quality = page.tables["quality"]
    assert quality[1] == ["mean", "worst", "mean", "worst"]
    assert quality[2:] == [
        ["zero-shot", "0.540", "0.500", "2.500", "3.000"],
        ["alone", "0.590", "0.520", "1.600", "1.700"],
        ["alone, own", "0.670", "0.640", "–", "–"],
        ["federated", "0.690", "0.500", "1.200", "1.300"],
        ["centralized", "0.700", "0.600", "1.100", "1.200"],
    ]
    assert page.tables["cost"][3] == ["federated", "11.8 MB", "999 B", "41 s", "900 MB", "369 k"]
    assert ("title", "11,796,480 bytes; evaluation 1,234") in page.attributes
    # `alone` per silo is measured on all tests: it stands in the table, apart from the silos' own tests.
    assert page.tables["per-silo"][0][1:] == ["zero-shot", "alone, own", "federated", "centralized", "alone, all tests"]
    assert page.tables["per-silo"][1] == ["tweets", "0.500", "0.700", "0.500", "0.600", "0.520"]
    assert "federated 0 of 2, centralized 2 of 2." in page.text
    for shown in ("tweets: not finite (2 times)", "fedtailor run experiments/quickstart.toml", "local.steps",
                  "What a day", 'Path.home() / "models/small"', 'PeftModel.from_pretrained(base, "adapter")'):
        assert shown in page.text
    assert str(Path.home()) not in page.text


def test_page_bolds_the_best_mean_only(tmp_path: Path) -> None:
    text = report.write(a_run(tmp_path)).read_text()
    assert [found.strip() for found in re.findall(r'<td class="start top"[^>]*>([\d.]+)', text)] == ["0.700", "1.100"]


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path))
    assert not {"script", "link", "img", "iframe", "object", "use", "a"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & {name for name, _ in page.attributes}
    text = (tmp_path / "report.html").read_text()
    assert "@import" not in text
    assert set(re.findall(r"url\([^)]*\)", text)) == {"url(#inside-loss)", "url(#inside-accuracy)"}
    assert "default-src 'none'" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    result = a_result()
    result["name"] = result["command"] = HOSTILE
    result["experiment"]["method"] = {"name": HOSTILE, HOSTILE: HOSTILE}
    result["environment"] = {HOSTILE: HOSTILE}
    federated = result["rows"]["federated"]
    federated["samples"] = [dict.fromkeys(SAMPLE, HOSTILE)]
    federated["rejected"] = {HOSTILE: 1}
    federated["accuracy"]["per_silo"][HOSTILE] = 0.5
    federated[HOSTILE] = metric(0.1, 0.2)
    federated[HOSTILE + "cost"] = 7
    result["rows"][HOSTILE] = row((0.1, 0.2), (1.0, 2.0))
    a_run(tmp_path, result)
    rounds(tmp_path / "rows" / "<b>row" / "rounds.jsonl", 2.0, 1.0)
    page = page_of(tmp_path)
    assert not {"script", "b", "bold"} & set(page.tags)
    assert "<script>alert('x')</script>" in page.text
    assert not {"\u202e", "\x07"} & set(page.text)
    assert not re.search(r"(?<!\\)<", report.markdown(result))
    table = report.markdown(result).split("\n\n")[1].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "[bold]b[/bold]" in in_terminal(result, width=600)


@pytest.mark.parametrize("left_out", ["zero_shot", "alone", "federated", "centralized"])
def test_any_row_may_be_absent(tmp_path: Path, left_out: str) -> None:
    result = a_result()
    del result["rows"][left_out]
    label = left_out.replace("_", "-")
    assert label not in [line[0] for line in page_of(a_run(tmp_path, result)).tables["quality"]]
    assert f"\n{label} " not in in_terminal(result)
    assert f"{label} 0." not in report.summary(result)


def test_nothing_but_a_version_is_enough(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"version": 1}')
    assert "No row has results yet." in page_of(tmp_path).text
    assert report.summary({"version": 1}) == "No results yet."
    assert report.markdown({"version": 1}) == "No results yet.\n"
    assert "No results yet." in in_terminal({"version": 1})


def test_not_finite_and_missing_numbers_are_dashes(tmp_path: Path) -> None:
    result = a_result()
    federated = result["rows"]["federated"]
    federated["accuracy"] = {"mean": float("nan"), "worst": None, "per_silo": {"tweets": float("inf")}}
    federated["seconds"] = None
    rounds(a_run(tmp_path, result) / "rows" / "federated" / "rounds.jsonl", float("nan"), 2.0, float("inf"))
    page = page_of(tmp_path)
    assert page.tables["quality"][5][:3] == ["federated", "–", "–"]
    assert page.tables["cost"][3][3] == "–"


def test_generation_metrics_and_unknown_ones() -> None:
    result: dict[str, Any] = {"version": 1, "rows": {
        "federated": {"loss": metric(2.0, 3.0, lower=True), "rouge_l": metric(0.2, 0.4), "epsilon": 8.0,
                      "recall_at_9": metric(0.5, 0.7)},
        "ensemble_of_two": {"loss": metric(2.0, 2.0, lower=True), "rouge_l": metric(0.1, 0.1)},
    }}
    assert report.primary(result) == "rouge_l"
    assert report.summary(result).endswith("over 2 silos reaches ROUGE-L 0.300; ensemble of two 0.100.")
    assert report.markdown(result).splitlines()[2:] == [
        "|  | ROUGE-L ↑ | worst | loss ↓ | worst | recall at 9 | worst | epsilon |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
        "| **federated** | **0.300** | **0.200** | **2.500** | **3.000** | **0.600** | **0.500** | **8.000** |",
        "| ensemble of two | 0.100 | 0.100 | 2.000 | 2.000 | – | – | – |",
    ]
    for line in result["rows"].values():
        del line["rouge_l"]
    assert "reaches loss 2.500 (lower is better); ensemble of two 2.000." in report.summary(result)


def test_several_seeds(tmp_path: Path) -> None:
    merged = a_result() | {"seeds": [0, 1]}
    for line in merged["rows"].values():
        line["accuracy"] |= {"spread": 0.0123, "by_seed": {"0": 0.68, "1": 0.7}}
        del line["samples"]
    for seed, low in ((0, 1.5), (1, 1.1)):
        folder = a_run(tmp_path / f"seed-{seed}")
        rounds(folder / "rows" / "federated" / "rounds.jsonl", 3.0, low)
    (tmp_path / "result.json").write_text(json.dumps(merged))
    curves = {curve.row: curve for curve in plots.read_curves([tmp_path / "seed-0", tmp_path / "seed-1"])}
    assert curves["federated"].points("loss") == [(0, 3.0, 3.0, 3.0), (1, pytest.approx(1.3), 1.1, 1.5)]
    page = page_of(tmp_path)
    assert page.tables["quality"][5][1] == "0.690±0.012"
    assert ("title", "seed 0: 0.680; seed 1: 0.700") in page.attributes
    assert ("class", "band") in page.attributes
    assert "(means of 2 seeds)" in page.text
    assert "What a day" in page.text, "the samples of the first seed"
    assert 'PeftModel.from_pretrained(base, "seed-0/adapter")' in page.text
    assert "0.690 ±0.012" in report.markdown(merged)


def test_the_gap_of_an_aggregation_has_a_curve_of_its_own(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    assert "exactness gap" not in page_of(folder).text
    file = folder / "rows" / "federated" / "rounds.jsonl"
    told = [json.loads(line) | {"gap": 0.02} for line in file.read_text().splitlines()[:-1]]
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in told))
    assert "exactness gap of the aggregation \N{DOWNWARDS ARROW}" in page_of(folder).text
    assert ("aria-label", "exactness gap of the aggregation by round") in page_of(folder).attributes


def test_many_silos_and_rounds_stay_small(tmp_path: Path) -> None:
    result = a_result()
    del result["rows"]["alone"]["own"]
    per_silo = {f"hospital_{i:03}": i / 100 for i in range(100)}
    for line in result["rows"].values():
        line["accuracy"]["per_silo"] = line["loss"]["per_silo"] = per_silo
    folder = a_run(tmp_path, result)
    for name in per_silo:
        rounds(folder / "rows" / "alone" / name / "rounds.jsonl", *(2 - i / 1000 for i in range(1000)))
    page = page_of(folder)
    assert len(page.tables["per-silo"]) == 101
    assert (page.tags.count("h3"), page.text.count("the 24 of 100 silos where federated is weakest")) == (26, 1)
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_samples_take_the_silos_in_turn(tmp_path: Path) -> None:
    result = a_result()
    for key, line in result["rows"].items():
        line["samples"] = [
            dict(zip(SAMPLE, (silo, f"{silo} prompt {i} " + "x" * 5000, "yes", f"{key} says {i}"), strict=True))
            for silo in SILOS for i in range(9)]
    page = page_of(a_run(tmp_path, result))
    shown = re.findall(r"(\w+ prompt \d)", page.text)
    assert shown == [f"{silo} prompt {i}" for i in range(4) for silo in SILOS]
    assert "zero_shot says 0" in page.text
    assert "x" * 1600 not in page.text


def test_a_torn_last_round_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    rounds(path, 3.0, 2.0, torn=True)
    assert [entry["round"] for entry in plots.read_rounds(path)] == [0, 1]
    path.write_text('{"rou\n' + path.read_text())
    with pytest.raises(UserError, match=r"rounds\.jsonl, line 1: not a round"):
        plots.read_rounds(path)


@pytest.mark.parametrize("losses", [(2.0,), (2.0, 2.0, 2.0), (0.0, 0.0), (-1.0, 3.0), (1e6, 2e6), (2.0, 1.9, 900.0)])
def test_curves_stay_inside_their_frame(losses: tuple[float, ...]) -> None:
    curve = plots.Curve("federated", "", ({i: {"loss": loss} for i, loss in enumerate(losses)},))
    svg = plots.draw([curve], "loss", "loss", plots.colours(["federated"]), {})
    assert svg.count('class="mark"') == len(losses)
    assert ("cut off" in svg) == (max(losses) == 900)
    ticks = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([\d.]+)', svg)]
    assert 2 <= len(ticks) <= 9
    assert all(0 < y < 270 for y in ticks)


def test_figures_over_all_rows_stand_beside_the_means() -> None:
    """Where a run has them (older ones have none), in Markdown and on the page; the terminal has no room."""
    result = a_result()
    assert "all rows" not in report.markdown(result)
    for line in result["rows"].values():
        line["accuracy"]["pooled"] = 0.4321
    head, _, *body = [line for line in report.markdown(result).splitlines() if line.startswith("|")]
    at = [cell.strip() for cell in head.split("|")].index("all rows")
    told = {line.split("|")[1].strip(" *"): line.split("|")[at].strip(" *") for line in body}
    assert told.pop("alone, own") == "–"  # counted by each silo over its own rows
    assert set(told.values()) == {"0.432"}
    assert head.count("all rows") == 1
    assert "0.432" not in in_terminal(result, width=200)


def test_the_terminal_table_fits_80_columns() -> None:
    shown = in_terminal(a_result(), width=80)
    federated = next(line for line in shown.splitlines() if line.startswith("federated"))
    assert " ".join(federated.split()) == "federated 0.690 0.500 1.200 11.8 MB 999 B 41 s 900 MB 369 k"


def test_what_is_no_run_folder_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no result\.json in it.*fedtailor run"):
        report.write(tmp_path)
    with pytest.raises(UserError, match=r"no result\.json in it"):
        report.write(tmp_path / "nowhere")
    for text, message in (("{", "not valid JSON"), ("[]", "version None"), ('{"version": 2}', "2, this .* version 1")):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            report.write(tmp_path)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_rendering_twice_is_the_same_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    before = {path.name for path in folder.iterdir()}
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


def test_rows_without_test_rows_are_told() -> None:
    assert report.summary({"rows": {"federated": {"bytes_up": 1}}, "seeds": [0]}) == "No test rows, so no results."


def test_a_search_is_drawn_by_its_calls(tmp_path: Path) -> None:
    """Over seeds a point stands at the mean calls of its round."""
    for seed, calls in ((0, 90), (1, 110)):
        folder = tmp_path / f"seed-{seed}" / "rows" / "federated"
        folder.mkdir(parents=True)
        entries = [
            {"round": n, "model_calls": n * calls, "val": {"accuracy": {"mean": 0.5 + n / 10 + seed / 100}}} for n in range(3)
        ]
        (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, entries)))
    curves = plots.read_curves([tmp_path / "seed-0", tmp_path / "seed-1"])
    kinds = plots.colours(["federated"])
    drawn = plots.draw(curves, "accuracy", "accuracy", kinds, {}, plots.CALLS)
    assert "model calls, all silos together" in drawn
    assert ">200</text>" in drawn
    assert "by model calls" in drawn
    assert plots._along(curves[0].points("accuracy"), curves[0].points(plots.CALLS))[2][0] == 200
    assert plots.draw(curves, "loss", "loss", kinds, {}, plots.CALLS) == ""
    assert ">round</text>" in plots.draw(curves, "accuracy", "accuracy", kinds, {})
