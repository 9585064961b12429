"""All silos in this process: the simulation of a federation. Bodies go through the wire here too, and are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedtailor import progress, wire
from fedtailor.core import Reply, Total
from fedtailor.engines.desk import Desk, Request, answer, seed_of
from fedtailor.errors import RunError
from fedtailor.faults import Faults

Record = Callable[[str, str, bytes], None]  # silo, "down" or "up", bytes
COHORTS = (2, 4, 8, 16, 32)
GAIN = 1.25  # a larger cohort must be this much faster per silo: its activations cost memory in proportion
BUSY = 0.25  # seconds: one silo's step that takes longer keeps a CPU busy by itself, so no cohort is tried


@dataclass
class Traffic:
    """Bytes of bodies on the wire since the last `take`."""

    up: int = 0
    down: int = 0

    def take(self) -> tuple[int, int]:
        up, down, self.up, self.down = self.up, self.down, 0, 0
        return up, down


@dataclass
class InProcess:
    """An engine over silos in this process. `reach` makes the `Ask` of a round; `commit` ends the round.

    cohort: silos per pass, or "auto": chosen by a short measurement before the first such ask, told to `on_plan`.
    record: called with every message, for audits.
    """

    data: Mapping[str, Any]  # silo name -> what becomes Silo.data
    models: Mapping[str, Any]
    seed: int = 0
    rounds: int = 1
    run: str = "run"
    cohort: int | Literal["auto"] = 1
    faults: Faults = field(default_factory=Faults)
    plan: dict[str, int] = field(default_factory=dict)  # work -> cohort size
    on_plan: Callable[[dict[str, int]], None] = lambda plan: None
    record: Record | None = None
    traffic: Traffic = field(default_factory=Traffic)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # round, silo, reason

    def __post_init__(self) -> None:
        self.desks: dict[str, Any] = {
            name: Desk(name, rows, self.models, self.seed, repeats=False) for name, rows in self.data.items()
        }
        self.silos = tuple(self.desks)
        self._place = (-1, 0)  # round, next ask index

    def reach(self, number: int, silos: Sequence[str] | None = None, *, disturbed: bool = True) -> Reach:
        """The `Ask` of round `number` over these silos (None: all); faults strike only where `disturbed`."""
        return Reach(self, self.silos if silos is None else tuple(silos), number, self.rounds, disturbed)

    def commit(self) -> list[str]:
        """The round has happened: memories are final. Returns the silos that took part."""
        number, self._place = self._place[0], (-1, 0)
        return [name for name, desk in self.desks.items() if desk.commit(number)]

    def next_index(self, number: int) -> int:
        self._place = (number, self._place[1] + 1 if self._place[0] == number else 0)
        return self._place[1]

    def groups(self, request: Request, silos: Sequence[str]) -> Iterator[list[Desk]]:
        """Silos in order, as many at once as the plan says."""
        desks = [self.desks[name] for name in silos]
        size = self._size(request, desks)
        return (desks[i : i + size] for i in range(0, len(desks), size))

    def _size(self, request: Request, desks: list[Desk]) -> int:
        together = getattr(wire.find_work(request.work), "__cohort__", None)
        if together is None or self.cohort == 1 or len(desks) < 2:
            return 1
        if hasattr(together, "together"):  # not a measure of speed: rows of many silos in shared batches
            return int(together.together)
        if isinstance(self.cohort, int):
            return self.cohort if self._probe(together, request) is not None else 1
        if request.work not in self.plan:
            self.plan[request.work] = self._measured(together, request, desks)
            self.on_plan(self.plan)
        return self.plan[request.work]

    def _probe(self, together: Any, request: Request) -> Any:
        body = wire.unpack(request.body)
        return together.probe(body) if hasattr(together, "probe") else body

    def _measured(self, together: Any, request: Request, desks: list[Desk]) -> int:
        """The cohort size with the least time per silo, by one small piece of the work on real rows."""
        body = self._probe(together, request)
        if body is None:
            return 1
        small = Request(request.run, request.round, request.index, request.work, wire.pack(body))

        def seconds(size: int) -> float:
            taken = []
            for _ in range(2):  # the first pays for warming up
                began = time.perf_counter()
                answer([Desk(d.name, d.data, d.models, d.seed, False, d.memory) for d in desks[:size]], small)
                taken.append(time.perf_counter() - began)
            return min(taken) / size

        best, least = 1, seconds(1)
        if least > BUSY and not torch.cuda.is_available():
            return 1
        for size in (c for c in COHORTS if c <= len(desks)):
            now = seconds(size)
            if now * GAIN > least:
                break
            best, least = size, now
        return best


@dataclass
class Reach:
    """An `Ask`: one engine, one round, the silos it reaches."""

    engine: InProcess
    silos: tuple[str, ...]
    round: int
    rounds: int
    disturbed: bool

    def __call__(
        self, work: Any, body: Any, *, to: Sequence[str] | None = None, deadline: float | None = None
    ) -> Iterator[Reply[Any]]:
        request = Request(
            self.engine.run, self.round, self.engine.next_index(self.round), wire.address(work), wire.pack(body)
        )
        wire.find_work(request.work)  # before any silo is asked: closures, methods and unmarked functions are refused
        return self._checked(request, body, self.silos if to is None else tuple(to), deadline)

    def total(
        self, work: Any, body: Any, *, to: Sequence[str] | None = None, deadline: float | None = None
    ) -> Total[Any]:
        summed: Any = None
        names: list[str] = []
        for reply in self(work, body, to=to, deadline=deadline):
            summed = wire.summed(reply.body, reply.body.weight, summed)
            names.append(reply.silo)
        if summed is None:
            raise RunError(f"round {self.round}: a total over no silo at all")
        return Total(summed, summed.weight, tuple(names))

    def _checked(
        self, request: Request, asked: Any, to: tuple[str, ...], deadline: float | None
    ) -> Iterator[Reply[Any]]:
        """Replies that can be used. Others are rejected by name. Raises RunError when none can."""
        used, why, missing = 0, [], dict.fromkeys(to, "no reply arrived")
        replies: Iterator[Reply[Any]] = self._arrived(request, to, deadline, missing)
        if self.disturbed:
            replies = self.engine.faults.inject(
                replies, seed_of(self.engine.seed, "faults", request.round, request.index)
            )
        for reply in replies:
            del missing[reply.silo]
            if (problem := _problem(reply.body, asked)) is not None:
                why.append(f"{reply.silo}: {problem}")
                self.engine.rejected.append((request.round, reply.silo, problem))
                progress.line(f"round {request.round}: reply of {reply.silo} rejected: {problem}")
                continue
            used += 1
            yield reply
        for name, reason in missing.items():
            why.append(f"{name}: {reason}")
            self.engine.rejected.append((request.round, name, reason))
        if not used and to:
            raise RunError(f"round {request.round}: no reply of {len(to)} silos could be used; {'; '.join(why[:3])}")

    def _arrived(
        self, request: Request, to: tuple[str, ...], deadline: float | None, missing: dict[str, str]
    ) -> Iterator[Reply[Any]]:
        """Replies as they come; one that took longer than the deadline is left out, and said so in `missing`."""
        engine = self.engine
        with progress.bar(f"round {request.round} {request.work.rpartition(':')[2]}", len(to)) as advance:
            for desks in engine.groups(request, to):
                began = time.perf_counter()
                replies = answer(desks, request)
                late = deadline is not None and time.perf_counter() - began > deadline
                for desk, reply in zip(desks, replies, strict=True):
                    engine.traffic.down += len(request.body)
                    engine.traffic.up += len(reply)
                    if engine.record is not None:
                        engine.record(desk.name, "down", request.body)
                        engine.record(desk.name, "up", reply)
                    advance()
                    if late:
                        missing[desk.name] = f"later than the deadline of {deadline} s"
                        continue
                    yield Reply(desk.name, wire.unpack(reply))


def _problem(body: Any, asked: Any) -> str | None:
    """Why this body must not be used: the silo failed, or what the body itself checks, or a number that is none."""
    if isinstance(body, wire.Failure):
        return body.error
    found: str | None = body.problem(asked) if hasattr(body, "problem") else wire.not_finite(body)
    return found
