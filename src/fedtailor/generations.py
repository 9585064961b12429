"""What a run needs to go on after a kill: server state and all silo memories, one generation, committed together.

A folder holds `generation.safetensors`, whose rename into place is the commit, and the files it names: the memory of
each silo as of the round it last took part in, and the best state so far. Files nobody names are swept afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.errors import UserError


@dataclass(frozen=True)
class Memory:
    """One silo's memory, on disk."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best round so far by validation, and its state; the metric of each silo in its own unit."""

    round: int
    per_silo: Mapping[str, float]
    state: Any


@dataclass(frozen=True)
class Generation:
    """All of a run as of the end of a round."""

    round: int
    state: Any
    log_bytes: int = 0  # of rounds.jsonl: what stands after them is of a commit that did not happen
    memories: Mapping[str, str] = field(default_factory=dict)  # silo -> file
    best: str = ""  # file


@dataclass(frozen=True)
class Kept:
    """A generation as it is read back."""

    round: int
    state: Any
    memories: Mapping[str, dict[str, Any]]
    best: Best | None
    log: list[dict[str, Any]]  # one entry per round


class Generations:
    """The generations of one trained row: the newest in state/, its log beside it as rounds.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"
        self.file = self.folder / "generation.safetensors"
        self.log = folder / "rounds.jsonl"
        self._memories: dict[str, str] = {}
        self._best = ""
        self._logged = self._log_bytes = 0  # entries and bytes of the log

    def newest(self) -> Kept | None:
        """What the last commit left; None before the first. Raises UserError when a file of it is damaged or gone."""
        if not self.file.exists():
            return None
        try:
            found: Generation = wire.read_file(self.file)
            self._memories, self._best = dict(found.memories), found.best
            memories = {silo: dict(wire.read_file(self.folder / name).values) for silo, name in found.memories.items()}
            best = wire.read_file(self.folder / found.best) if found.best else None
            log = [json.loads(line) for line in self.log.read_bytes()[: found.log_bytes].splitlines()]
            os.truncate(self.log, found.log_bytes)
        except (wire.WireError, FileNotFoundError, ValueError) as error:
            what = f"{self.folder}: damaged ({error}); delete {self.folder.parent} to train that row anew"
            raise UserError(what) from error
        self._logged, self._log_bytes = len(log), found.log_bytes
        return Kept(found.round, found.state, memories, best, log)

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
        self._append(log[self._logged :])
        wire.write_file(self.file, Generation(number, state, self._log_bytes, dict(self._memories), self._best))
        named = {self.file.name, self._best, *self._memories.values()}
        for file in self.folder.iterdir():
            if file.name not in named:
                file.unlink()

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """On the disk before the generation that counts it: a log is never rewritten, however long a run is."""
        text = "".join(f"{json.dumps(entry, allow_nan=False)}\n" for entry in entries).encode()
        with self.log.open("r+b" if self.log.exists() else "w+b") as file:
            file.truncate(self._log_bytes)
            file.seek(self._log_bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._logged += len(entries)
        self._log_bytes += len(text)
