"""Progress as lines, as bars on a terminal, or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from fedtailor import progress


@pytest.fixture(autouse=True)
def _silent_afterwards() -> Iterator[None]:
    yield
    progress.show(progress.Silent())


def test_nothing_is_said_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    progress.line("hello")
    with progress.bar("work", 3) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_lines_say_each_event_and_a_bar_with_time_left() -> None:
    said: list[str] = []
    progress.show(progress.Lines(said.append, gap=0.0))
    progress.line("round 1")
    with progress.bar("train", 3) as advance:
        for _ in range(3):
            advance()
    assert said[0] == "round 1"
    assert re.fullmatch(r"train: 1 of 3, about \d+ s left", said[1])
    assert re.fullmatch(r"train: 2 of 3, about \d+ s left", said[2])
    assert len(said) == 3, "what is done has no time left to tell"


def test_what_goes_wrong_is_said_though_the_rest_is_hushed() -> None:
    said: list[str] = []
    progress.show(progress.Lines(said.append))
    with progress.hushed(), progress.hushed():
        progress.line("round 1")
        progress.aloud("tracking stops here")
    progress.line("done")
    assert said == ["tracking stops here", "done"]


def test_a_quick_bar_says_nothing() -> None:
    said: list[str] = []
    progress.show(progress.Lines(said.append, gap=3600.0))
    with progress.bar("train", 100) as advance:
        for _ in range(100):
            advance()
    assert said == []


def test_a_terminal_shows_bars_inside_bars_and_clears_them() -> None:
    written = io.StringIO()
    terminal = progress.Terminal(Console(file=written, force_terminal=True, width=80))
    progress.show(terminal)
    with progress.bar("rounds", 2) as outer:
        with progress.bar("train", 4) as inner:
            for _ in range(4):
                inner()
            terminal.display.refresh()
        outer()
        progress.line("[round] 1 of 2")  # brackets are text, not markup
        assert terminal.depth == 1
    assert terminal.depth == 0
    shown = written.getvalue()
    assert "rounds" in shown
    assert "  train" in shown
    assert "4/4" in shown
    assert "[round] 1 of 2" in shown


def test_a_bar_of_one_step_is_not_shown() -> None:
    written = io.StringIO()
    progress.show(progress.Terminal(Console(file=written, force_terminal=True)))
    with progress.bar("alone", 1) as advance:
        advance()
    assert written.getvalue() == ""


def test_a_failure_inside_a_bar_takes_the_bar_away() -> None:
    terminal = progress.Terminal(Console(file=io.StringIO(), force_terminal=True))
    progress.show(terminal)
    with pytest.raises(ValueError, match="stop"), progress.bar("rounds", 2), progress.bar("train", 2):
        raise ValueError("stop")
    assert terminal.depth == 0
    assert terminal.display.finished or not terminal.display.live.is_started
