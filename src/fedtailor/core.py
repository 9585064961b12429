"""The contract, on one screen. A method is a frozen dataclass that asks; an engine is what answers.

    @in_silo
    def count(silo: Silo, body: Words) -> Counts:             # the only code that runs next to private rows
        return Counts(sum(body.word in row.prompt for row in silo.data.train))
    class Counting(Method):
        def round(self, state, ask):
            return state + sum(reply.body.n for reply in ask(count, Words("fever")))

Bodies are frozen dataclasses of tensors and plain JSON; they cross through `wire`, in one process too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

Up = TypeVar("Up")
Down = TypeVar("Down")
State = TypeVar("State")
Work = TypeVar("Work", bound=Callable[..., Any])


@dataclass
class Silo:
    """One data holder, as the code inside it sees it."""

    name: str
    data: Any  # .train, .val, .test rows and .settings, or .corpus
    models: Mapping[str, Any]  # resident base models by name, shared by all silos of a process, never copied
    seed: int  # from experiment seed, silo name, round and ask index: the same for any engine
    memory: dict[str, Any] = field(default_factory=dict)  # tensors and JSON, kept between rounds by the engine


@dataclass(frozen=True)
class Reply(Generic[Up]):
    silo: str
    body: Up  # may define `problem(asked) -> str | None`: why this reply must not be used


@dataclass(frozen=True)
class Total(Generic[Up]):
    """All that the server sees of a secure sum."""

    sum: Up  # each tensor and number of the replies, times the reply's `weight`, added in silo order in fp32
    weight: float
    silos: tuple[str, ...]  # who is in the sum


Asked = Callable[[Silo, Down], Up]  # an in_silo function
To = Sequence[str] | None  # None: all that the Ask reaches
Wait = float | None  # seconds; replies that come later are ignored


class Ask(Protocol):
    """All that a method knows of an engine. Replies come in silo order; failed ones are left out, and counted."""

    silos: tuple[str, ...]  # whom it reaches: this round's sample
    round: int  # 1-based; 0 before the first and after the last
    rounds: int  # how many are planned, for schedules
    here: Silo  # the server itself: public rows as .train, its residents; it remembers by the method's state alone

    def __call__(
        self, work: Asked[Down, Up], body: Down, *, to: To = None, deadline: Wait = None
    ) -> Iterator[Reply[Up]]: ...
    def total(self, work: Asked[Down, Up], body: Down, *, to: To = None, deadline: Wait = None) -> Total[Up]: ...


@overload
def in_silo(work: Work) -> Work: ...
@overload
def in_silo(*, cohort: Callable[..., Any] | None = None, memory: bool = True) -> Callable[[Work], Work]: ...
def in_silo(work: Any = None, *, cohort: Callable[..., Any] | None = None, memory: bool = True) -> Any:
    """Mark a module-level `(silo, body) -> up` as allowed next to private data: `grep in_silo` is the privacy audit.

    `cohort(silos, body) -> [up]` does many silos in one pass, equal up to rounding (1e-5 in fp32). Its attribute `probe`
    gives a smaller body for timing, None where it cannot stand in for `work`; or `together`: silos it always takes.
    Without `memory` the work sees an empty one, and leaves none.
    """

    def mark(function: Work) -> Work:
        if "." in function.__qualname__:  # a method, or a function inside one ("<locals>.")
            raise TypeError(f"in_silo: {function.__qualname__} must be a module-level function, to be found by name")
        function.__in_silo__, function.__cohort__, function.__memory__ = True, cohort, memory  # type: ignore[attr-defined]
        return function

    return mark if work is None else mark(work)


class Served(Protocol):
    """What was learnt: a frozen dataclass that crosses the wire."""

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Any: ...  # a `models.Answers`


class Method(Protocol[State]):
    """A frozen dataclass; its fields are its settings. Found by name: methods/<name>.py or "package.module:Class"."""

    def begin(self, ask: Ask) -> State: ...
    def round(self, state: State, ask: Ask) -> State: ...  # may ask zero, one or many times
    def serve(self, state: State) -> Served: ...
    def pooled(self, silos: int) -> Method[Any]:
        """This method as one silo doing the work of `silos` of them: the centralized baseline."""
        return self
