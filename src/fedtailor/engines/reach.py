"""The server's side of any engine: one `Ask` for all of them. Replies are checked, faults injected, rejections named.

An engine only carries: `carry(request, to, deadline)` yields what arrived, in any order a silo may be late in.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedtailor import progress, wire
from fedtailor.core import Reply, Silo, Total
from fedtailor.engines.desk import Request, seed_of
from fedtailor.errors import NoReply, RunError, printable
from fedtailor.faults import Faults
from fedtailor.packed import Packed

Record = Callable[[str, str, Packed], None]  # silo, "down" or "up", what crossed


@dataclass
class Traffic:
    """Bytes of bodies on the wire since the last `take`."""

    up: int = 0
    down: int = 0

    def take(self) -> tuple[int, int]:
        up, down, self.up, self.down = self.up, self.down, 0, 0
        return up, down


@dataclass(frozen=True)
class Arrival:
    """What came of asking one silo: a packed reply, or why there is none to use."""

    silo: str
    reply: Packed = b""
    missing: str = ""


class Carrier(Protocol):
    """What `Reach` needs of an engine."""

    @property
    def run(self) -> str: ...
    @property
    def seed(self) -> int: ...

    minimum: int  # usable replies without which an exchange fails
    faults: Faults
    waited: float  # for replies since this was last taken, in times of a usual silo's time
    rejected: list[tuple[int, str, str]]  # round, silo, reason
    public: Any  # the server's own rows
    models: Mapping[str, Any]  # and its residents

    def next_index(self, number: int) -> int: ...  # of the ask within its round
    def packed(self, body: Any) -> Packed: ...
    def carry(self, request: Request, to: tuple[str, ...], deadline: float | None) -> Iterator[Arrival]: ...


@dataclass
class Reach:
    """An `Ask`: one engine, one round, the silos it reaches. Faults strike only where `disturbed`."""

    engine: Carrier
    silos: tuple[str, ...]
    round: int
    rounds: int
    disturbed: bool
    here: Silo = field(init=False)

    def __post_init__(self) -> None:
        seed = seed_of(self.engine.seed, "server", self.round, 0)
        self.here = Silo("server", self.engine.public, self.engine.models, seed)

    def __call__(
        self, work: Any, body: Any, *, to: Sequence[str] | None = None, deadline: float | None = None
    ) -> Iterator[Reply[Any]]:
        name = wire.address(work)
        wire.find_work(name)  # before any silo is asked: closures, methods and unmarked functions are refused
        packed, index = self.engine.packed(body), self.engine.next_index(self.round)
        request = Request(self.engine.run, self.round, index, name, packed)
        return self._checked(request, work, body, self.silos if to is None else tuple(to), deadline)

    def total(
        self, work: Any, body: Any, *, to: Sequence[str] | None = None, deadline: float | None = None
    ) -> Total[Any]:
        summed: Any = None
        names: list[str] = []
        for reply in self(work, body, to=to, deadline=deadline):
            summed = wire.summed(reply.body, reply.body.weight, summed)
            names.append(reply.silo)
            del reply  # a large one is not held while the next one is read
        if summed is None:
            raise RunError(f"round {self.round}: a total over no silo at all")
        return Total(summed, summed.weight, tuple(names))

    def _checked(
        self, request: Request, work: Any, asked: Any, to: tuple[str, ...], deadline: float | None
    ) -> Iterator[Reply[Any]]:
        """Replies that can be used. Others are rejected by name. Raises RunError when none can."""
        kind = _returned(work)
        used, why, missing = 0, [], dict.fromkeys(to, "no reply arrived")
        replies = self._arrived(request, to, deadline, missing)
        if self.disturbed:
            seed = seed_of(self.engine.seed, "faults", request.round, request.index)
            replies = self.engine.faults.inject(replies, seed, missing)
            self.engine.waited += self.engine.faults.waited(to, seed)
        for reply in replies:
            del missing[reply.silo]
            if (found := _problem(reply.body, asked, kind)) is not None:
                problem = printable(found)
                why.append(f"{reply.silo}: {problem}")
                self.engine.rejected.append((request.round, reply.silo, problem))
                progress.line(f"round {request.round}: reply of {reply.silo} rejected: {problem}")
                continue
            used += 1
            yield reply
        for name, reason in missing.items():
            reason = printable(reason)
            why.append(f"{name}: {reason}")
            self.engine.rejected.append((request.round, name, reason))
        if 0 < used < min(self.engine.minimum, len(to)):
            few = f"{used} replies that could be used, fewer than engine.minimum = {self.engine.minimum}"
            raise RunError(f"round {request.round}: {few}; {'; '.join(why[:3])}")
        if not used and to:
            raise NoReply(f"round {request.round}: no reply of {len(to)} silos could be used; {'; '.join(why[:3])}")

    def _arrived(
        self, request: Request, to: tuple[str, ...], deadline: float | None, missing: dict[str, str]
    ) -> Iterator[Reply[Any]]:
        """Replies as the engine brings them; why there is none is said in `missing`."""
        for arrival in self.engine.carry(request, to, deadline):
            if arrival.missing:
                missing[arrival.silo] = arrival.missing
                continue
            try:
                body = wire.unpack(arrival.reply)
            except wire.WireError as error:
                missing[arrival.silo] = f"its reply cannot be read: {error}"
                continue
            yield Reply(arrival.silo, body)


def _returned(work: Any) -> Any:
    """The class that a work is written to return; `object` where it does not say so plainly."""
    try:
        kind = typing.get_type_hints(work).get("return", object)
    except NameError:  # a name that is known to type checkers alone
        return object
    plain = isinstance(kind, type) or all(isinstance(one, type) for one in typing.get_args(kind) or (kind,))
    return kind if plain and typing.get_origin(kind) in (None, types.UnionType, typing.Union) else object


def _problem(body: Any, asked: Any, kind: Any) -> str | None:
    """Why this body must not be used: the silo failed, or what the body itself checks, or a number that is none."""
    if isinstance(body, wire.Failure):
        return body.error
    if not isinstance(body, kind):
        return f"a body of class {type(body).__name__} was not asked for"
    try:
        found: str | None = body.problem(asked) if hasattr(body, "problem") else wire.not_finite(body)
    except Exception as error:  # of a shape that its own check did not think of: one silo's, and no failure of the round
        return f"cannot be checked ({type(error).__name__}: {error})"
    return found
