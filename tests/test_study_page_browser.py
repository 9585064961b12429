"""The page of a made-up study in a real browser: nothing overflows, no two texts of a chart touch, paper shows all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from fedtailor.study import page
from shown_studies import everything

OVERLAPS = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => [t.getBoundingClientRect(), t.textContent]).filter(([b]) => b.width);
    texts.forEach(([a, one], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        found.push(["outside", one]);
      for (const [b, other] of texts.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
          found.push([one, other]);
    });
  }
  return found;
})()"""
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, svg")
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
SHOWN = '[...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width).length'
SCALE = """Math.min(...[...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect())
  .map((box, i) => box.width / document.querySelectorAll("svg")[i].viewBox.baseVal.width).filter(scale => scale))"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write(*everything(), tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_overflows_and_no_texts_touch(tab: browser.Page, written: Path, width: int) -> None:
    tab.requested.clear()
    tab.open(written.as_uri(), width)
    assert tab.find("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.find(OUTSIDE) == []
    assert tab.find(OVERLAPS) == []
    assert tab.find(SHOWN) == 8, "each chart once: for a page or for a column"
    assert tab.find(SCALE) >= 1.33, "9 points are 12 pixels: nothing is drawn smaller than it was made"
    assert tab.requested == [written.as_uri()]
    assert tab.complaints == []


@pytest.mark.browser
def test_paper_shows_every_chart_and_table_whole(tab: browser.Page, written: Path) -> None:
    tab.open(written.as_uri(), 695)  # A4 less its margins
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.find(SHOWN) == 8
        assert tab.find(OVERLAPS) == []
        assert tab.find(OUTSIDE.replace(".scroll, ", "")) == []
        assert tab.find("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        tables = "[...document.querySelectorAll('table')]"
        assert tab.find(f"{tables}.length") > 8
        assert tab.find(f"{tables}.filter(t => t.getBoundingClientRect().right > innerWidth || !t.offsetHeight).length") == 0
        heights = tab.find('[...document.querySelectorAll("figure")].map(f => f.getBoundingClientRect().height)')
        assert max(heights) < 1017, "269 mm: a chart and its caption fit on one sheet"
        assert tab.find("getComputedStyle(document.querySelector('.files')).display") == "none"
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.browser
def test_charts_stay_on_white_in_the_dark(tab: browser.Page, written: Path) -> None:
    tab.open(written.as_uri(), 1280, scheme="dark")
    assert tab.find("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert tab.find("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"
