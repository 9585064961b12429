"""Silos in processes of their own: an engine over any courier. The same `Reach` as in one process.

Every silo keeps its own memory, so a commit here is the server's state alone; each request says which round was
committed last, and a silo then takes what it has open of that round as final. What is lost on the way is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtailor import progress, wire
from fedtailor.engines.courier import Answer, Courier
from fedtailor.engines.desk import Request
from fedtailor.engines.reach import Arrival, Reach, Record, Traffic
from fedtailor.engines.worker import Open, Opened
from fedtailor.errors import printable
from fedtailor.faults import Faults
from fedtailor.packed import Packed

OPENING = 15.0  # seconds for silos to open in, at first: doubled each time in an exchange; what was begun there goes on
REFUSED = (15.0, 600.0)  # seconds until a silo that may not take part is told again: at first, doubled up to
PAUSE = (0.1, 10.0)  # seconds before a lost message is sent again: the first time, and at most; doubled in between


@dataclass(frozen=True)
class Refusal:
    """Why a silo may not take part, and until when it is not asked again."""

    why: str = ""
    pause: float = REFUSED[0] / 2
    until: float = 0.0


@dataclass
class Remote:
    """An engine over workers that a courier reaches.

    deadline: seconds that one exchange may take, all repeats included. minimum: replies without which a round fails.
    patience: seconds that silos which cannot be reached are waited for once all others have answered; for one that missed
    the exchange before, too, half of them, then a quarter, ..., until it answers again.
    model_sha256, tokenizer_sha256: of the base that all must compute with; "": those of the first silo that opens.
    spool: a folder for large bodies.
    """

    courier: Courier
    opening: Open
    rounds: int = 1
    deadline: float = 3600.0
    minimum: int = 1
    patience: float = 120.0
    model_sha256: str = ""
    tokenizer_sha256: str = ""
    spool: Path | None = None
    faults: Faults = field(default_factory=Faults)
    record: Record | None = None
    public: Any = None  # the server's own rows, and its residents: `Ask.here`
    models: Mapping[str, Any] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    waited: float = 0.0  # as `Faults.waited` tells
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    opened: dict[str, Opened] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)  # exchanges in a row that a silo could not be reached in

    def __post_init__(self) -> None:
        self.silos = tuple(self.courier.silos)
        self.faults = self.faults.settled(self.silos, self.seed)
        self._place = (-1, 0)  # round, next ask index
        self._committed = -1
        self._refused: dict[str, Refusal] = {}

    @property
    def run(self) -> str:
        return self.opening.run

    @property
    def seed(self) -> int:
        return self.opening.seed

    def reach(self, number: int, silos: Sequence[str] | None = None, *, disturbed: bool = True) -> Reach:
        """The `Ask` of round `number` over these silos (None: all); faults strike only where `disturbed`."""
        return Reach(self, self.silos if silos is None else tuple(silos), number, self.rounds, disturbed)

    def commit(self) -> dict[str, dict[str, Any]]:
        """The round has happened. Silos are told with the next request; their memories stay with them."""
        self._committed, self._place = max(self._committed, self._place[0]), (-1, 0)
        return {}

    def restore(self, number: int, memories: Mapping[str, dict[str, Any]]) -> None:
        """An earlier process committed round `number`."""
        self._committed = number

    def next_index(self, number: int) -> int:
        self._place = (number, self._place[1] + 1 if self._place[0] == number else 0)
        return self._place[1]

    def packed(self, body: Any) -> Packed:
        return wire.spooled(body, self.spool)

    def carry(self, request: Request, to: tuple[str, ...], deadline: float | None) -> Iterator[Arrival]:
        """In silo order, each as soon as those before it are settled."""
        request = replace(request, committed=self._committed)
        came: dict[str, Arrival] = {}
        queue = list(to)
        with progress.bar(str(request), len(to)) as advance:
            for arrival in self._gathered(request, to, self.deadline if deadline is None else deadline):
                advance()
                came[arrival.silo] = arrival
                while queue and queue[0] in came:
                    yield came.pop(queue.pop(0))

    def _gathered(self, request: Request, to: Sequence[str], seconds: float) -> Iterator[Arrival]:
        """One arrival for each silo. Lost messages are sent again, later and later, until the time is up, or patience is."""
        end, pause, waiting = time.monotonic() + seconds, PAUSE[0], list(to)
        why: dict[str, str] = {}
        head = {"kind": "ask", "run": request.run, "round": request.round, "index": request.index, "work": request.work,
                "committed": request.committed}  # fmt: skip
        settled = 0.0  # since when nothing comes any more but from silos that cannot be reached
        opening, begun = OPENING, set(self.opened)
        while waiting and (left := end - time.monotonic()) > 0:
            back = len(waiting)
            # those that are ready first: another may take long to load its base, or be there and say nothing
            if ready := [silo for silo in waiting if silo in self.opened]:
                for answer in self.courier.exchange(ready, head, request.body, left):
                    self.traffic.down += len(request.body)
                    self._noted(answer.silo, "down", request.body)
                    if (arrival := self._arrival(answer, request, why)) is not None:
                        waiting.remove(answer.silo)
                        self.missed.pop(answer.silo, None)
                        yield arrival
            left = end - time.monotonic()
            if left > 0 and (closed := [silo for silo in waiting if silo not in self.opened]):
                for silo, reason in self._open(closed, min(opening, left), why).items():
                    waiting.remove(silo)
                    yield Arrival(silo, missing=reason)
                opening *= 2
                if any(silo in self.opened and silo not in begun for silo in waiting):
                    begun |= set(self.opened)  # once each: one that opens and knows of nothing, again and again, is paused for
                    continue
            now = time.monotonic()
            settled = now if len(waiting) < back or not settled else settled
            # none at all: then it is rather the engine's server that is away, and the whole deadline is its
            enough = len(to) == 1 or len(to) - len(waiting) >= self.minimum
            lost = [s for s in waiting if enough and now - settled >= self.patience / 2 ** self.missed.get(s, 0)]
            for silo in lost:
                waiting.remove(silo)
                self.missed[silo] = self.missed.get(silo, 0) + 1
                yield Arrival(silo, missing=why.get(silo, "it cannot be reached"))
            if waiting and end - now > 0:
                time.sleep(min(pause, max(0.0, end - now)))
                pause = min(2 * pause, PAUSE[1])
        for silo in waiting:
            yield Arrival(silo, missing=why.get(silo, f"no reply within {seconds:.3g} s"))

    def _arrival(self, answer: Answer, request: Request, why: dict[str, str]) -> Arrival | None:
        """What an answer means; None: ask again."""
        kind = answer.head.get("kind")
        if answer.lost:
            why[answer.silo] = answer.lost
        elif kind == "unknown":  # the worker came back without this run in its memory
            self.opened.pop(answer.silo, None)
        elif kind == "refused":
            return Arrival(answer.silo, missing=str(answer.head.get("why"))[:500])
        elif kind == "reply" and answer.head.get("id") == request.id(answer.silo):
            self.traffic.up += len(answer.body)
            self._noted(answer.silo, "up", answer.body)
            return Arrival(answer.silo, answer.body)
        else:
            why[answer.silo] = f"answered {kind!r} to another request than this"
        return None

    def _open(self, silos: Sequence[str], seconds: float, why: dict[str, str]) -> dict[str, str]:
        """Tell these silos of the run. Returns why some may not take part; `why`: why others could not be told.

        A silo that may not is not told again at once: then it would read all its rows for every exchange.
        """
        now = time.monotonic()
        refused = {silo: self._refused[silo].why for silo in silos if silo in self._refused and now < self._refused[silo].until}
        asked, body = [silo for silo in silos if silo not in refused], wire.pack(self.opening)
        for answer in self.courier.exchange(asked, {"kind": "open"}, body, seconds) if asked else ():
            if answer.lost:
                why[answer.silo] = answer.lost
                continue
            reason = str(answer.head.get("why"))[:500] if answer.head.get("kind") != "opened" else self._unlike(answer)
            if reason is None:
                self._refused.pop(answer.silo, None)
                continue
            refused[answer.silo] = reason
            before = self._refused.get(answer.silo, Refusal())
            pause = min(2 * before.pause, REFUSED[1])
            self._refused[answer.silo] = Refusal(reason, pause, time.monotonic() + pause)
            if reason != before.why:
                progress.line(f"{answer.silo} cannot take part: {printable(reason)}")
        return refused

    def _unlike(self, answer: Answer) -> str | None:
        """Why a silo that has opened must not take part all the same."""
        try:
            found = wire.unpack(answer.body)
        except wire.WireError as error:
            return f"what it opened with cannot be read: {error}"
        if not isinstance(found, Opened):
            return f"it opened with a {type(found).__name__}"
        self.model_sha256 = self.model_sha256 or found.model_sha256
        self.tokenizer_sha256 = self.tokenizer_sha256 or found.tokenizer_sha256
        for what, there, here in (
            ("base model", found.model_sha256, self.model_sha256),
            ("tokenizer", found.tokenizer_sha256, self.tokenizer_sha256),
        ):
            if there != here:
                return f"its {what} is another one (sha256 {there[:12]}, asked {here[:12]})"
        self.opened[answer.silo] = found
        return None

    def _noted(self, silo: str, direction: str, body: Packed) -> None:
        if self.record is not None:
            self.record(silo, direction, body)
