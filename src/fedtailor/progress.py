"""What a person sees while waiting: a bar with time left on a terminal, plain lines elsewhere, nothing by default.

Library code says what it does through `line` and `bar`; the command line decides how it is shown (`show`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Shown(Protocol):
    def line(self, text: str) -> None: ...
    def bar(self, label: str, total: int) -> Any: ...  # a context manager giving advance()


class Silent:
    def line(self, text: str) -> None: ...

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        yield lambda: None


class _Hushed(Silent):
    def __init__(self, loud: Shown) -> None:
        self.loud = loud
        self.bar = loud.bar  # type: ignore[method-assign]


class Lines:
    """For logs: one line per event; of a bar, a line at most every `gap` seconds."""

    def __init__(self, write: Callable[[str], Any], gap: float = 15.0) -> None:
        self.write, self.gap = write, gap

    def line(self, text: str) -> None:
        self.write(text)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        began = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= self.gap and done < total:
                said = now
                self.write(f"{label}: {done} of {total}, about {(now - began) / done * (total - done):.0f} s left")

        yield advance


class Terminal:
    """Bars under the lines already said: the outer work above, its parts below."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self.display: Any = None
        self.depth = 0

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if total < 2:
            yield lambda: None
            return
        if self.depth == 0:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.display = Progress(*columns, console=self.console, transient=True)
            self.display.start()
        self.depth += 1
        task = self.display.add_task("  " * (self.depth - 1) + label, total=total)
        try:
            yield lambda: self.display.advance(task)
        finally:
            self.display.remove_task(task)
            self.depth -= 1
            if self.depth == 0:
                self.display.stop()


_shown: Shown = Silent()


def show(how: Shown) -> None:
    global _shown
    _shown = how


@contextmanager
def hushed() -> Iterator[None]:
    """Meanwhile bars alone are shown: what one of hundreds of runs has to tell is in its own log."""
    global _shown
    loud = _shown
    _shown = _Hushed(loud)
    try:
        yield
    finally:
        _shown = loud


def line(text: str) -> None:
    _shown.line(text)


def aloud(text: str) -> None:
    """A line that is told though others are hushed: what goes wrong, and holds for all that comes."""
    shown = _shown
    while isinstance(shown, _Hushed):
        shown = shown.loud
    shown.line(text)


def bar(label: str, total: int) -> Any:
    """`with bar("train", 4) as advance:` then `advance()` four times."""
    return _shown.bar(label, total)
