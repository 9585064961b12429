"""The server program's side in a kit, whatever the engine: it alone holds the kit, and the engine's server end calls it there."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtailor.engines import frames
from fedtailor.engines import kit as kits
from fedtailor.engines.courier import Answer, Head, Link
from fedtailor.engines.keeping import listen, locked
from fedtailor.errors import FedtailorError
from fedtailor.packed import Packed

GRACE = 15.0  # seconds beyond an exchange's time after which an end that says nothing is given up


class Program:
    """One program for a kit, and one exchange at a time. Raises UserError where another holds it."""

    def __init__(self, kit: Path) -> None:
        self.kit = kit
        self._number = 0
        with contextlib.ExitStack() as held:
            held.enter_context(locked(kit / ".program", "another program runs over this federation; wait for it, or end it"))
            self._listening = held.enter_context(listen(kit / kits.SOCKET))
            self._held = held.pop_all()

    def close(self) -> None:
        (self.kit / kits.SOCKET).unlink(missing_ok=True)
        self._held.close()

    def called(self, job: str, wait: float) -> tuple[Link, dict[str, Any]] | None:
        """The server end of this job, if it calls within `wait` seconds, and what it says. Any other is told by hanging up."""
        if not select.select([self._listening], [], [], max(0.0, wait))[0]:
            return None
        link = Link(fileno=self._listening.accept()[0].detach())
        link.until(5.0)
        with contextlib.suppress(OSError, FedtailorError):
            said, _ = frames.receive(link, 0)
            if said.get("job") == job:
                return link, said
        link.close()
        return None

    def exchange(
        self, link: Link, waiting: list[str], head: Head, body: Packed, end: float,
        gone: Callable[[Sequence[str]], Sequence[str]] = lambda waiting: (),
    ) -> Iterator[Answer]:  # fmt: skip
        """Answers as they come; who has answered leaves `waiting`. `gone`: who of these went away and will not answer.

        Raises OSError or FrameError where the end is lost, TimeoutError where it says nothing in time.
        """
        self._number += 1
        seconds = max(0.05, end - time.monotonic())
        asked = {"kind": "exchange", "id": str(self._number), "to": waiting, "seconds": seconds, "head": head}
        link.until(seconds + GRACE)
        if waiting:
            frames.send(link, asked, body)
        while waiting:
            answer = self._received(link, waiting, gone)
            if answer is not None:
                waiting.remove(answer.silo)
                yield answer
            del answer  # a large one is not held while the next one comes

    def _received(
        self, link: Link, waiting: Sequence[str], gone: Callable[[Sequence[str]], Sequence[str]]
    ) -> Answer | None:
        """What comes next, None where that concerns no one that is waited for."""
        if not select.select([link], [], [], 1.0)[0]:
            if time.monotonic() > link.end:
                raise TimeoutError
            return next((Answer(silo, lost="its site went away") for silo in gone(waiting)), None)
        said, body = frames.receive(link, spool=self.kit / "spool")
        silo, told = str(said.get("silo")), said.get("head")
        if said.get("kind") != "answer" or said.get("id") != str(self._number) or silo not in waiting:
            return None  # a late answer to an exchange that was given up
        return Answer(silo, told if isinstance(told, dict) else {}, body, str(said.get("lost", "")))
