"""The page of questions in a real browser: typed into, streamed to, measured; nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import PATIENCE, opened
from fedtailor.errors import RunError
from fedtailor.retrieval.answered import Answered
from test_page import HOSTILE, SOURCES, Answers, serving

PIECES = ("Parents may take 26 weeks [north/hand", "book.md#Leave], says [nobody] and [south]. ", HOSTILE + " [", "v" * 200)
SHIFTS = """window.shifted = 0; new PerformanceObserver(list => {
  for (const entry of list.getEntries()) window.shifted += entry.value;
}).observe({ type: "layout-shift" })"""
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(element => !element.closest(".text:not(p)")
  && element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(element => element.outerHTML)"""
NEUTRAL = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_an_answer_as_it_is_written(tmp_path: Path, width: int) -> None:
    more = threading.Semaphore(0)

    def script(question: str) -> Iterator[Answered]:
        known = {"asked": ("north", "south", "west"), "spared": ("east",)}
        assert more.acquire(timeout=PATIENCE)
        yield Answered(question, **known)
        known |= {"sources": SOURCES, "missing": {"west": "<b>no reply</b> in 10 s"}}
        for count in range(len(PIECES) + 1):
            assert more.acquire(timeout=PATIENCE)
            yield Answered(question, "".join(PIECES[:count]), **known)
        assert more.acquire(timeout=PATIENCE)
        yield Answered(question, "".join(PIECES), **known, done=True, seconds={"retrieval": 0.4, "writing": 2.0})

    answers = Answers(script)
    with serving(answers) as address, opened(tmp_path / "profile") as page:
        page.open(f"{address}/", width)
        assert page.find("document.activeElement.id") == "question", "one can type at once"
        page.type("How long is the leave?")
        page.press("Enter", 13)
        page.until("document.getElementById('status').textContent === 'Asking'")
        assert page.find("document.getElementById('answer').getAttribute('aria-busy')") == "true"
        page.find("new Promise(shown => requestAnimationFrame(() => requestAnimationFrame(shown)))")
        page.find(SHIFTS)
        more.release()
        page.until("document.getElementById('status').textContent === 'Searching 3 silos'")
        assert page.find("document.getElementById('silos').innerText").split("\n") == [
            "asked", "north, south, west", "not asked", "east (not promising)", "missing", "–"]  # fmt: skip
        more.release()
        page.until("document.querySelectorAll('#sources .card').length === 3")
        shown = "document.getElementById('answer').textContent"
        more.release()
        page.until(f"{shown} === 'Parents may take 26 weeks '")  # what may become a citation waits
        more.release()
        page.until(f"{shown} === 'Parents may take 26 weeks [north/handbook.md#Leave], says [nobody] and [south]. '")
        links = "[...document.querySelectorAll('#answer a')].map(a => [a.textContent, a.getAttribute('href')])"
        cited = [["[north/handbook.md#Leave]", "#source-1"], ["[south]", "#source-3"]]
        assert page.find(links) == cited
        more.release(2)
        page.until(f"{shown}.includes('vvv')")
        page.find("new Promise(shown => requestAnimationFrame(() => requestAnimationFrame(shown)))")
        assert page.find("window.shifted") == 0, "nothing moves while it is written"
        more.release()
        page.until("document.getElementById('status').textContent.startsWith('Answered')")
        assert page.find("document.getElementById('status').textContent") == (
            "Answered (retrieval 0.4 s, writing 2.0 s); 1 silo is missing from it")
        clean = "".join(PIECES).replace("\x1b", NEUTRAL).replace("\u202e", NEUTRAL)
        assert page.find(shown) == clean
        assert page.find(links) == cited, "nothing else is a link"
        assert page.find("document.getElementById('answer').getAttribute('aria-busy')") == "false"
        assert page.find("document.querySelector('#source-2 .text').textContent").startswith("<script>fetch")
        assert page.find("document.querySelector('#source-3 .text').textContent") == "Its silo lets out no text of it."
        assert page.find("document.querySelector('#silos .missing dd').innerText") == "west: <b>no reply</b> in 10 s"
        assert page.find("[...document.querySelectorAll('.card.used')].map(card => card.id)") == ["source-1", "source-3"]
        page.find("document.querySelector('#answer a').click()")
        assert page.find("document.activeElement.id") == "source-1"
        assert page.find("[...document.querySelectorAll('.lit')].map(card => card.id)") == ["source-1"]

        wide = page.find("document.documentElement.clientWidth")
        assert wide in range(width - 20, width + 1), "less a scrollbar"
        assert page.find("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") <= wide
        assert page.find(OUTSIDE) == []
        assert page.find("document.querySelectorAll('main img, main script, main b').length") == 0
        loaded = page.find("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert {re.sub(r"^http://127\.0\.0\.1:\d+/", "", name) for name in loaded} == {"page.css", "page.js", "ask"}
        assert [name for name in page.requested if not name.startswith((f"{address}/", "data:,"))] == []
        assert page.complaints == []


@pytest.mark.browser
def test_a_browser_shows_what_went_wrong_and_stops(tmp_path: Path) -> None:
    more = threading.Semaphore(0)

    def script(question: str) -> Iterator[Answered]:
        if question == "none":
            yield Answered(question, found=False, done=True, asked=("north",))
        elif question == "fail":
            yield Answered(question, "so far")
            raise RunError("no silo answered")
        else:
            for count in range(1, 200):
                yield Answered(question, "a" * count)
                assert more.acquire(timeout=PATIENCE)

    answers = Answers(script)
    problem, status = (f"document.getElementById('{name}').textContent" for name in ("problem", "status"))
    with serving(answers) as address, opened(tmp_path / "profile") as page:
        page.open(f"{address}/", 1280)

        def ask(question: str) -> None:
            page.find("document.getElementById('question').select()")
            page.type(question)
            page.press("Enter", 13)

        page.press("Enter", 13)
        page.until(f"{problem} === 'Type a question first.'")
        ask("\N{PILE OF POO}" * 2001)
        page.until(f"{problem} === 'A question has at most 2,000 letters; say it shorter.'")
        assert page.find("document.getElementById('count').textContent") == "2,001 of 2,000 letters"
        assert answers.asked == []
        ask("fail")
        page.until(f"{problem} === 'No silo answered'")
        assert page.find(status) == "What stands here is not the whole answer"
        assert page.find("document.getElementById('answer').textContent") == "so far"
        ask("none")
        page.until(f"{status} === 'No passage answers this'")
        assert page.find(problem) == ""
        assert page.find("document.getElementById('answer').textContent") == "No passage answers this question."
        assert page.find("document.getElementById('no-source').textContent") == "None."
        ask("long")
        page.until("document.getElementById('answer').textContent === 'a'")
        answers.ended.clear()
        page.press("Escape", 27)
        page.until(f"{status} === 'Stopped: what stands here is not the whole answer'")
        while not answers.ended.wait(0.05):
            more.release()
        assert answers.ends == ["failed", "whole", "stopped"]
        assert page.complaints == []
