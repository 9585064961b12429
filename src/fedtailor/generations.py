"""What a run needs to go on after a kill: server state and all silo memories, one generation, committed together.

A folder holds `generation.safetensors`, whose rename into place is the commit, and the files it names: the memory of
each silo as of the round it last took part in, and the best state so far. Files nobody names are swept afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor import wire


@dataclass(frozen=True)
class Memory:
    """One silo's memory, on disk."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best round so far by validation, and its state; `value` in the metric's own unit."""

    round: int
    value: float
    state: Any


@dataclass(frozen=True)
class Generation:
    """All of a run as of the end of a round."""

    round: int
    state: Any
    log: list[dict[str, Any]] = field(default_factory=list)  # one entry per round
    memories: Mapping[str, str] = field(default_factory=dict)  # silo -> file
    best: str = ""  # file


class Generations:
    """The generations of one trained row: the newest in state/, its log beside it as rounds.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"
        self.file = self.folder / "generation.safetensors"
        self.log = folder / "rounds.jsonl"
        self._memories: dict[str, str] = {}
        self._best = ""

    def newest(self) -> tuple[Generation, dict[str, dict[str, Any]], Best | None] | None:
        """The last committed generation, its silos' memories, and the best state; None before the first commit."""
        if not self.file.exists():
            return None
        found: Generation = wire.read_file(self.file)
        self._memories, self._best = dict(found.memories), found.best
        self._write_log(found.log)  # a kill may have come between commit and log
        memories = {silo: dict(wire.read_file(self.folder / name).values) for silo, name in found.memories.items()}
        return found, memories, wire.read_file(self.folder / found.best) if found.best else None

    def commit(
        self,
        number: int,
        state: Any,
        memories: Mapping[str, Mapping[str, Any]],
        best: Best | None,
        log: Sequence[dict[str, Any]],
    ) -> None:
        """`memories`: of the silos that took part since the last commit. Killed at any moment: old or new, never half."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {name: i for i, name in enumerate(sorted({*self._memories, *memories}))}
        for silo, values in memories.items():
            if not values:
                self._memories.pop(silo, None)
                continue
            name = f"memory-{number}-{known[silo]}.safetensors"  # a silo's name need not be a file name
            wire.write_file(self.folder / name, Memory(values))
            self._memories[silo] = name
        if best is not None and self._best != (name := f"best-{best.round}.safetensors"):
            wire.write_file(self.folder / name, best)
            self._best = name
        wire.write_file(self.file, Generation(number, state, list(log), dict(self._memories), self._best))
        self._write_log(log)
        named = {self.file.name, self._best, *self._memories.values()}
        for file in self.folder.iterdir():
            if file.name not in named:
                file.unlink()

    def _write_log(self, log: Sequence[dict[str, Any]]) -> None:
        wire.write_bytes(self.log, "".join(f"{json.dumps(entry)}\n" for entry in log).encode())
