"""All silos in this process: the simulation of a federation. Bodies go through the wire here too, and are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fedtailor import progress, wire
from fedtailor.engines.desk import Desk, Request, answer
from fedtailor.engines.reach import Arrival, Reach, Record, Traffic
from fedtailor.faults import Faults
from fedtailor.packed import Packed

COHORTS = (2, 4, 8, 16, 32)
GAIN = 1.25  # a larger cohort must be this much faster per silo: its activations cost memory in proportion
BUSY = 0.25  # seconds: one silo's step that takes longer keeps a CPU busy by itself, so no cohort is tried


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
    minimum: int = 1
    faults: Faults = field(default_factory=Faults)
    plan: dict[str, int] = field(default_factory=dict)  # work -> cohort size
    on_plan: Callable[[dict[str, int]], None] = lambda plan: None
    record: Record | None = None
    public: Any = None  # the server's own rows: `Ask.here.data`
    traffic: Traffic = field(default_factory=Traffic)
    waited: float = 0.0  # as `Faults.waited` tells
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # round, silo, reason

    def __post_init__(self) -> None:
        self.desks: dict[str, Any] = {
            name: Desk(name, rows, self.models, self.seed, repeats=False) for name, rows in self.data.items()
        }
        self.silos = tuple(self.desks)
        self.faults = self.faults.settled(self.silos, self.seed)
        self._place = (-1, 0)  # round, next ask index

    def reach(self, number: int, silos: Sequence[str] | None = None, *, disturbed: bool = True) -> Reach:
        """The `Ask` of round `number` over these silos (None: all); faults strike only where `disturbed`."""
        return Reach(self, self.silos if silos is None else tuple(silos), number, self.rounds, disturbed)

    def commit(self) -> dict[str, dict[str, Any]]:
        """The round has happened: memories are final. Returns those of the silos that took part."""
        number, self._place = self._place[0], (-1, 0)
        return {name: desk.memory for name, desk in self.desks.items() if desk.commit(number)}

    def restore(self, number: int, memories: Mapping[str, dict[str, Any]]) -> None:
        """The memories of an earlier process, as of its last commit, that of round `number`."""
        for name, memory in memories.items():
            self.desks[name].memory = memory

    def next_index(self, number: int) -> int:
        self._place = (number, self._place[1] + 1 if self._place[0] == number else 0)
        return self._place[1]

    def packed(self, body: Any) -> Packed:
        return wire.pack(body)

    def carry(self, request: Request, to: tuple[str, ...], deadline: float | None) -> Iterator[Arrival]:
        """In silo order. A pass that took longer than the deadline is counted, and not used."""
        passes = list(self.groups(request, to))
        with progress.bar(str(request), len(passes)) as advance:
            for desks in passes:
                began = time.perf_counter()
                replies = answer(desks, request)
                late = deadline is not None and time.perf_counter() - began > deadline
                advance()
                for desk, reply in zip(desks, replies, strict=True):
                    self.traffic.down += len(request.body)
                    self.traffic.up += len(reply)
                    if self.record is not None:
                        self.record(desk.name, "down", request.body)
                        self.record(desk.name, "up", reply)
                    yield Arrival(desk.name, reply, f"later than the deadline of {deadline} s" if late else "")

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
                answer([replace(d, repeats=False, round=0, done=[]) for d in desks[:size]], small)
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

