"""A courier without a network, for tests of what asks through one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor.engines.courier import Answer
from fedtailor.engines.site import Site
from fedtailor.engines.worker import Worker
from fedtailor.packed import Packed

SILOS = ("cafe", "clinic", "shop")


@dataclass
class Straight:
    """A courier that calls the workers; `fate(silo)` says what becomes of each message."""

    folder: Path
    fate: Any = lambda silo: "fine"
    silos: tuple[str, ...] = SILOS
    workers: dict[str, Worker] = field(default_factory=dict)
    sent: list[tuple[str, str]] = field(default_factory=list)

    def worker(self, silo: str) -> Worker:
        if silo not in self.workers:
            (self.folder / silo).mkdir(parents=True, exist_ok=True)
            self.workers[silo] = Worker(Site(silo, self.folder / silo, server_names_data=True))
        return self.workers[silo]

    def __enter__(self) -> Straight:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def exchange(self, to: Sequence[str], head: Mapping[str, Any], body: Packed, timeout: float) -> Iterator[Answer]:
        for silo in reversed(to):  # not in order: the engine puts them in order
            self.sent.append((silo, head["kind"]))
            fate = self.fate(silo)
            if fate == "never arrives":
                yield Answer(silo, lost="lost on the way there")
                continue
            if fate == "twice":
                self.worker(silo).handle(head, body)
            answer = self.worker(silo).handle(head, body)
            if fate == "dies after":
                del self.workers[silo]
            yield Answer(silo, lost="lost on the way back") if fate == "reply lost" else Answer(silo, *answer)
            if fate == "dies":
                del self.workers[silo]
