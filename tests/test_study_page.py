"""The page of made-up studies: what stands on it, what it links to, what it must not let through."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

import studies
from fedtailor.errors import RunError
from fedtailor.files import write_json
from fedtailor.study import page
from fedtailor.study.grid import Study, shown
from shown_studies import everything


def small(**head: object) -> Study:
    parts = (
        {"name": "p", "asks": "performance", "rows": ["federated", "centralized"], "axes": {"method": ["prefix", "lora"]}},
        {"name": "r", "axes": {"dropout": [0.0, 0.5]}},
    )
    return studies.study(*parts, **head)  # type: ignore[arg-type]


def text_of(path: Path) -> str:
    body = path.read_text(encoding="utf-8").partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<svg.*?</svg>", "", body))).split())


def test_the_page_tells_findings_charts_tables_and_how_it_was_run(tmp_path: Path) -> None:
    one = small(title="Does it work?", about="A & B")
    found = studies.found(one, lambda at, row, seed: (0.8 if row == "federated" else 0.81) + 0.001 * seed)
    write_json(tmp_path / "cells" / found[0].cell.key / "result.json", {"command": "fedtailor study /home/me/x/it.toml --jobs 2"})
    shown = page.write(one, found, tmp_path)
    assert shown == tmp_path / "report.html"
    text = text_of(shown)
    assert text.startswith("Does it work? A & B 2 parts · 9 of 9 have figures")
    assert re.search(r"Method prefix: federated is at most 2\.0 points worse|close|points worse", text)
    assert "✓ holds" in text
    assert "paired one-sided t of non-inferiority over 3 seeds" in text
    assert "Accuracy along dropout" in text
    assert "command fedtailor study it.toml --jobs 2 seeds 0, 1, 2" in text
    assert "[base]" in text, "the experiment itself, not where its file was"
    assert 'method = ["prefix", "lora"]' in text, "in one line"
    assert "What is missing" not in text


def test_all_that_the_page_links_to_is_there_and_nothing_is_loaded(tmp_path: Path) -> None:
    one = small()
    found = studies.found(one, lambda at, row, seed: 0.8)
    source = page.write(one, found, tmp_path).read_text()
    links = set(re.findall(r'href="([^"#][^"]*)"', source))
    assert {Path(link).suffix for link in links} == {".svg", ".png", ".csv", ".tex"}
    assert links == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} - {"report.html"}
    assert set(re.findall(r'href="#(part-[^"]*|findings|run)"', source)) <= set(re.findall(r'id="([^"]*)"', source))
    assert "default-src 'none'; style-src 'unsafe-inline'" in source
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)| on\w+=", source)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    one, found = everything()
    some = [each for each in found if each.part == "names"]
    source = page.write(one, some, tmp_path).read_text()
    assert "<script" not in source
    assert "<b>" not in source
    assert not set("\u202e\x07") & set(source)
    assert "&lt;script&gt;" in source


def test_nothing_finished_is_a_page_that_says_so(tmp_path: Path) -> None:
    text = text_of(page.write(small(), [], tmp_path))
    assert text.count("No cell of this part is finished.") == 2
    assert "p (method prefix): seeds 0, 1, 2" in text
    assert list((tmp_path).rglob("*.svg")) == []


def test_a_share_without_end_is_rounded_wherever_it_is_read(tmp_path: Path) -> None:
    """Sentences, tables, charts, what is missing: all but the file itself."""
    parts = [{"name": asks, "asks": asks, "axes": {"method": ["lora"], "dropout": [0.0, 1 / 7, 2 / 7]}}
             for asks in ("performance", "efficiency", "robustness")]  # fmt: skip
    one = studies.study(*parts)
    found = studies.found(one, lambda at, row, seed: None if at["dropout"] > 0.2 and seed else {
        **studies.accuracy(0.8 - at["dropout"] + 0.01 * seed), "bytes_up": 10, "bytes_down": 10, "seconds": 1.0})  # fmt: skip
    told, plain = page.write(one, found, tmp_path).read_text().partition('id="run"')[0], [0.1, 0.125, 100.0, 0.00062, "x"]
    assert "0.142857" not in told + "".join(path.read_text() for path in tmp_path.rglob("*.csv"))
    assert told.count("0.143") > 10
    assert [shown(value) for value in (1 / 7, 2 / 3, 1e6 / 7, *plain)] == [
        "0.143", "0.667", "142857", "0.1", "0.125", "100", "0.00062", "x"]  # fmt: skip


def test_nothing_yet_is_said_only_where_there_is_no_figure(tmp_path: Path) -> None:
    """A part without a federated row has a table, a chart, and no sentence."""
    parts = ({"name": "p", "asks": "performance", "rows": ["centralized"], "axes": {"method": ["prefix", "lora"]}},
             {"name": "e", "asks": "efficiency", "axes": {"method": ["lora"]}})  # fmt: skip
    one = studies.study(*parts)
    text = text_of(page.write(one, studies.found(one, lambda at, row, seed: 0.8 + 0.1 * seed), tmp_path))
    assert "No sentence; the figures are below." in text
    assert "Nothing yet." not in text


def test_what_is_missing_or_failed_is_named(tmp_path: Path) -> None:
    one = small()
    lost = next(cell for cell in one.cells if dict(cell.at) == {"dropout": 0.5} and cell.seed == 1)
    write_json(tmp_path / "cells" / lost.key / "failed.json", {"why": "/home/me/data/rows.jsonl: no <column>"})
    gone = {("r", 0.5, 1), ("p", "lora", 2)}
    found = [each for each in studies.found(one, lambda at, row, seed: 0.8)
             if (each.part, *each.at.values(), each.seed) not in gone or each.row == "centralized"]  # fmt: skip
    text = text_of(page.write(one, found, tmp_path))
    assert "r (dropout 0.5), seed 1 : rows.jsonl: no <column>" in text
    assert page.missing(one, found) == ["p (method lora), federated: seed 2", "r (dropout 0.5): seed 1"]


def test_what_cannot_be_written_is_told_and_the_old_page_stays(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    (tmp_path / "report.html").write_text("old")
    one = small()
    with pytest.raises(RunError, match=r"cannot write .*plots.*; make room or make the folder writable"):
        page.write(one, studies.found(one, lambda at, row, seed: 0.8), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ('base = "/home/me/my tests/tiny.toml"', 'base = "tiny.toml"'),
        ("fedtailor study /home/me/it.toml --out ../runs/it", "fedtailor study it.toml --out ../runs/it"),
        ("fedtailor study '/home/my me/it.toml'", "fedtailor study 'it.toml'"),
        ("see https://example.org/a/b and a/b or /", "see https://example.org/a/b and a/b or /"),
        ('prompt = "yes/no: {text}"', 'prompt = "yes/no: {text}"'),
    ],
)
def test_no_folder_of_the_machine_is_told(given: str, shown: str) -> None:
    assert page.without_places(given) == shown


def test_work_is_counted_once_for_parts_that_share_a_cell() -> None:
    part = {"axes": {"method": ["lora"]}}
    one = studies.study({"name": "a", **part}, {"name": "b", **part}, seeds=(0,))
    found = studies.found(one, lambda at, row, seed: {**studies.accuracy(0.5), "seconds": 5400.0, "evaluation_seconds": 1800.0})
    told = page.run_of(one, found, "")
    assert (told["work"], told["cells"]) == ("2.0 h", "1 of 1 have figures")
    assert "command" not in told
