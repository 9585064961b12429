"""What a silo was asked and has told of its documents in the last days: a small SQLite file beside the index, so that the limits
of its policy hold over restarts, runs and processes. Booked before anything is told: after a kill too much is booked, never too
little.

Times are seconds since 1970, given by the caller. Limits are of sliding windows: one that ends at t holds what was booked after
t - 1 hour, or a day. A clock that is set back by up to a day lets nothing more through.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedtailor.errors import SiloError, UserError, printable
from fedtailor.retrieval.policy import Policy

HOUR, DAY = 3600.0, 86400.0
KEPT = 2 * DAY
OURS = 0x6674616B  # "ftak", in the file's head
Column = Literal["questions", "words"]


@dataclass(frozen=True)
class Left:
    """What an asker may still have; None: as much as it likes."""

    questions: int | None
    words: int | None


@dataclass(frozen=True)
class Limit:
    setting: str  # of [documents]
    most: int
    column: Column
    span: float  # seconds
    asker: str | None  # None: of all together


class Ledger:
    """Open. Any thread, and any number of processes, may use it. Use as a context manager, or `close` it."""

    def __init__(self, path: Path) -> None:
        """Made where there is none. Raises UserError for a file of another kind, or where nothing can be written."""
        self.path, self.lock = path, threading.Lock()
        try:
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._begin()
        except sqlite3.DatabaseError as error:
            what = "cannot be opened" if isinstance(error, sqlite3.OperationalError) else "is damaged, or of another program"
            raise UserError(f"{path}: what was asked is kept there, but it {what} ({error}); move it, or give access") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()

    def take(self, policy: Policy, asker: str, now: float, questions: int = 0, words: int = 0) -> None:
        """Books them. Raises SiloError, with nothing booked, where a limit would be passed, or where they cannot be kept."""
        if questions < 0 or words < 0 or not math.isfinite(now):
            raise ValueError(f"{questions} questions and {words} words at {now}: nothing can be given back, nor asked at no time")
        name, more = printable(asker), {"questions": questions, "words": words}
        with self._changing():
            self.db.execute("delete from taken where at + ? <= ?", (KEPT, now))
            limits = [limit for limit in _limits(policy, name) if more[limit.column]]
            waits = [(self._free(limit, more[limit.column], now), limit) for limit in limits]
            free, last = max(waits, key=lambda one: one[0], default=(now, None))
            if last is not None and free > now:
                raise SiloError(_refusal(last, more[last.column], free, now))
            if questions or words:
                self.db.execute("insert into taken values (?, ?, ?, ?)", (now, name, questions, words))

    def left(self, policy: Policy, asker: str, now: float) -> Left:
        """The least that its limits and those over all leave. Changes nothing."""
        found: dict[Column, int | None] = {"questions": None, "words": None}
        with self._changing():
            for limit in _limits(policy, printable(asker)):
                rest = max(0, limit.most - sum(count for _, count in self._within(limit, now)))
                known = found[limit.column]
                found[limit.column] = rest if known is None else min(known, rest)
        return Left(found["questions"], found["words"])

    def _free(self, limit: Limit, more: int, now: float) -> float:
        """When so many more are within it: now, a later time, or never (infinity)."""
        if more > limit.most:
            return math.inf
        free, booked = now, self._within(limit, now)
        over = sum(count for _, count in booked) + more - limit.most
        for at, count in booked:
            if over <= 0:
                break
            free, over = at + limit.span, over - count
        return free

    def _within(self, limit: Limit, now: float) -> list[tuple[float, int]]:
        """(when, how many), the oldest first. What is booked at a later time than now counts: the clock was set back."""
        wanted = f"select at, {limit.column} from taken where at + ? > ? and {limit.column} > 0"
        if limit.asker is None:
            return self.db.execute(f"{wanted} order by at", (limit.span, now)).fetchall()
        return self.db.execute(f"{wanted} and asker = ? order by at", (limit.span, now, limit.asker)).fetchall()

    def _begin(self) -> None:
        self.db.execute("pragma synchronous = full")  # what is booked is on the disk
        with self._transaction():
            if self.db.execute("pragma application_id").fetchone()[0] != OURS:
                if self.db.execute("select count(*) from sqlite_master").fetchone()[0]:
                    raise UserError(f"{self.path}: no list of what was asked, but another program's; name another file")
                self.db.execute("create table taken (at real, asker text, questions integer, words integer)")
                self.db.execute(f"pragma application_id = {OURS}")
        with suppress(sqlite3.OperationalError):  # another process is at it: it makes the same of it
            self.db.execute("pragma journal_mode = wal")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Raises SiloError where it fails: what cannot be booked is not told."""
        try:
            with self._transaction():
                yield
        except sqlite3.Error as error:
            raise SiloError(f"what is asked cannot be kept ({error}), so nothing is told; the silo's owner must look") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """No other thread or process reads or books in between."""
        with self.lock, self.db:
            self.db.execute("begin immediate")
            yield


def _limits(policy: Policy, asker: str) -> Iterator[Limit]:
    for setting, column, span in (("questions_per_hour", "questions", HOUR), ("words_per_day", "words", DAY)):
        for name, whose in ((setting, asker), (f"{setting}_all", None)):
            most: int | None = getattr(policy, name)
            if most is not None:
                yield Limit(name, most, column, span, whose)  # type: ignore[arg-type]


def _refusal(limit: Limit, more: int, free: float, now: float) -> str:
    whose = "over all askers" if limit.asker is None else f"for {limit.asker!r}"
    what = f"[documents] {limit.setting} = {limit.most} {whose}: {more} more {limit.column}"
    if free == math.inf:
        return f"{what} at once are more than it ever allows; ask for fewer"
    at = f"{datetime.fromtimestamp(math.ceil(free), UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"{what} would pass it; free again in {math.ceil(free - now)} seconds, at {at}"
