"""A silo's side of any engine: takes a request, runs the `in_silo` work, keeps memory so that nothing is applied twice.

A request is known by run, round, ask index, silo and body. The same request again gets the recorded reply. A changed
one at the same place restarts from the memory before that place. Memory becomes final when the server commits the round;
what lies in it under `limits.TOLD` at once, as the account of what has left the silo.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor import packed, wire
from fedtailor.core import Silo
from fedtailor.errors import SiloError
from fedtailor.limits import TOLD
from fedtailor.packed import Packed


@dataclass(frozen=True)
class Request:
    run: str
    round: int
    index: int  # of the ask within its round
    work: str  # "module:name"
    body: Packed
    committed: int = -1  # the last round that the server has committed: what was open of it is final

    def __str__(self) -> str:
        return f"round {self.round} {self.work.rpartition(':')[2]}"

    def id(self, silo: str) -> str:
        place = f"{self.run}\n{self.round}\n{self.index}\n{silo}\n{self.work}\n".encode()
        return hashlib.sha256(place + packed.digest(self.body)).hexdigest()


@dataclass
class Done:
    """One request of the open round that was answered."""

    id: str
    reply: Packed | None
    memory: dict[str, Any] | None  # after this request; None: as before it


@dataclass
class Desk:
    """One silo: its data, its memory, what it answered in the open round."""

    name: str
    data: Any
    models: Mapping[str, Any]
    seed: int
    repeats: bool = True  # a request may come twice, as over a network: then replies are held until the commit
    spool: Path | None = None  # a folder for large replies
    rows_sha256: str = ""  # of `data`, where a run must find the same after a restart
    memory: dict[str, Any] = field(default_factory=dict)  # as of the last commit; under TOLD, as of the last reply
    round: int = 0
    done: list[Done] = field(default_factory=list)  # by ask index of the open round

    def recorded(self, request: Request) -> Packed | None:
        """The reply given to this very request, if it was given in the open round."""
        known = [d.reply for d in self.done if d.id == request.id(self.name) and d.reply is not None]
        return known[0] if known and request.round == self.round else None

    def silo(self, request: Request, *, remembers: bool) -> Silo:
        """The view for a new request, with a copy of the memory as it was before it. What came after is forgotten.

        Raises SiloError for a message of a round that is over: a late copy must not undo what came after it.
        """
        if request.committed >= self.round:
            self.commit(self.round)
        if self.repeats and request.round < self.round:
            raise SiloError(f"a request of round {request.round} came late: this silo is at round {self.round}")
        if request.round != self.round:
            self.round, self.done = request.round, []  # the open round was never committed: it did not happen
        del self.done[request.index :]
        while len(self.done) < request.index:  # asks that went to other silos
            self.done.append(Done("", b"", None))
        seed = seed_of(self.seed, self.name, request.round, request.index)
        memory = copy.deepcopy(self._latest()) if remembers else {}
        return Silo(self.name, self.data, self.models, seed, memory)

    def record(self, request: Request, reply: Packed, memory: dict[str, Any] | None) -> None:
        self.done.append(Done(request.id(self.name), reply if self.repeats else None, memory))
        if memory is not None and TOLD in memory:
            self.memory = {**self.memory, TOLD: memory[TOLD]}

    def packed(self, request: Request, up: Any) -> Packed:
        """A large reply goes to a file by the request's id in `spool`, so that it can be repeated after a restart."""
        if self.spool is None or not wire.large(up):
            return wire.pack(up)
        self.spool.mkdir(parents=True, exist_ok=True)
        file = self.reply(request.id(self.name))
        wire.write_file(file, up)
        return packed.Spooled(file.open("rb", buffering=0))

    def reply(self, request: str) -> Path:
        assert self.spool is not None
        return self.spool / f"{request}.safetensors"

    def commit(self, number: int) -> bool:
        """Make round `number`'s memory final; what another, abandoned round left is forgotten. Whether it may have changed."""
        if self.round != number:
            self.done = []
        changed = any(done.memory is not None for done in self.done)
        self.memory, self.done = self._latest(), []
        return changed

    def _latest(self) -> dict[str, Any]:
        latest = next((done.memory for done in reversed(self.done) if done.memory is not None), self.memory)
        return {**latest, TOLD: self.memory[TOLD]} if TOLD in self.memory else latest


def answer(desks: Sequence[Desk], request: Request) -> list[Packed]:
    """Packed replies of these silos to one request, in order; several silos go through the work's cohort function.

    A `SiloError` becomes a packed `Failure`, and leaves the memory as it was. Any other exception is a bug and is raised.
    """
    replies = {desk.name: desk.recorded(request) for desk in desks}
    new = [desk for desk in desks if replies[desk.name] is None]
    if new:
        work, body = wire.find_work(request.work), wire.unpack(request.body)
        for desk, silo, up in _worked(work, new, request, body):
            keeps = work.__memory__ and not isinstance(up, wire.Failure)
            replies[desk.name] = reply = desk.packed(request, up)
            desk.record(request, reply, silo.memory if keeps else None)
    return [reply for reply in replies.values() if reply is not None]


def _worked(work: Any, desks: Sequence[Desk], request: Request, body: Any) -> list[tuple[Desk, Silo, Any]]:
    silos = [desk.silo(request, remembers=work.__memory__) for desk in desks]
    try:
        ups = [work(silos[0], body)] if len(silos) == 1 else list(work.__cohort__(silos, body))
    except SiloError as error:
        if len(silos) == 1:
            return [(desks[0], silos[0], wire.Failure(str(error)))]
        # one of them cannot: find out who, one by one, each from its memory before this pass
        return [done for desk in desks for done in _worked(work, [desk], request, body)]
    return list(zip(desks, silos, ups, strict=True))


def seed_of(seed: int, *place: Any) -> int:
    """A seed for a place (silo, round, ask index): the same on every engine, unrelated for any two places."""
    text = "\n".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
