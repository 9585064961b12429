"""What a run over a federation last knew, in the server's kit: `standing.json`, read while the run goes on and after it.

    {"run": folder, "since": seconds, "rounds": 4, "model_sha256": "...", "at": "tiny/federated/0", "round": 2,
     "round_since": seconds, "ended": seconds,
     "silos": {"north": {"fedtailor": "0.1.0", "torch": "2.9.0", "model_sha256": "...", "answered": seconds,
                         "lost": "no reply within 5 s", "lost_at": seconds}}}

Times are seconds since 1970. Only heads of messages are looked at. Nothing depends on it: a run goes on where it cannot be
written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fedtailor.engines.courier import Answer, Courier, Head
from fedtailor.errors import UserError
from fedtailor.packed import Packed

FILE = "standing.json"
EVERY = 1.0  # seconds between two writings, at least
KEPT = ("fedtailor", "torch", "answered")  # from one run to the next
OPENED = ("fedtailor", "torch", "model_sha256")  # of the head of an "opened" answer: what a silo computes with


@dataclass
class Noted:
    """A courier that keeps the standing of the run which it carries for. It must not be used after its end."""

    courier: Courier
    kit: Path
    run: str  # the run's folder
    rounds: int
    model_sha256: str = ""  # of the base that the run computes with
    _known: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _timer: threading.Timer | None = None
    _held: TextIO | None = None

    @property
    def silos(self) -> tuple[str, ...]:
        return self.courier.silos

    def __enter__(self) -> Noted:
        self._held = _shared(self.kit)
        before = (read(self.kit) or {}).get("silos", {})
        silos = {silo: {key: one[key] for key in KEPT if key in one} for silo, one in before.items()}
        self._known = {"run": self.run, "since": time.time(), "rounds": self.rounds, "model_sha256": self.model_sha256}
        self._known["silos"] = silos
        self._write()
        return self

    def __exit__(self, *raised: object) -> None:
        if not raised or raised[0] is None:
            self._known["ended"] = time.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self._write()
        if self._held is not None:
            self._held.close()

    def exchange(self, to: Sequence[str], head: Head, body: Packed, timeout: float) -> Iterator[Answer]:
        if head.get("kind") == "ask":
            now = {"at": str(head.get("run")).partition("/")[2], "round": head.get("round")}
            if any(self._known.get(key) != value for key, value in now.items()):
                self._changed({**now, "round_since": time.time()})
        with contextlib.closing(_closable(self.courier.exchange(to, head, body, timeout))) as answers:
            for answer in answers:
                self._changed({}, answer)
                yield answer

    def _changed(self, more: Mapping[str, Any], answer: Answer | None = None) -> None:
        with self._lock:
            self._known |= more
            if answer is not None:
                self._known["silos"].setdefault(answer.silo, {}).update(_told(answer))
            if self._timer is None:  # one writing tells of all that comes until then
                self._timer = threading.Timer(EVERY, self._write)
                self._timer.daemon = True
                self._timer.start()

    def _write(self) -> None:
        from fedtailor import wire  # brings torch in, which those who read do without

        with self._lock:
            self._timer = None
            text = json.dumps(self._known, indent=1) + "\n"
        with contextlib.suppress(OSError):
            wire.write_bytes(self.kit / FILE, text.encode())


def _told(answer: Answer) -> dict[str, Any]:
    """What an answer says of its silo. A refusal is an answer, and a reason too."""
    kind, now = answer.head.get("kind"), time.time()
    why = answer.lost or (str(answer.head.get("why"))[:500] if kind == "refused" else "")
    known: dict[str, Any] = {"lost": why, "lost_at": now} if why else {}
    if not answer.lost:
        known["answered"] = now
    if kind == "opened":
        known |= {key: str(answer.head[key])[:100] for key in OPENED if answer.head.get(key)}
    return known


def _closable(answers: Iterator[Answer]) -> Any:
    """Couriers yield from generators; a test's may be a plain iterator, which holds nothing to be freed."""
    return answers if hasattr(answers, "close") else (answer for answer in answers)


def read(kit: Path) -> dict[str, Any] | None:
    """The last run's standing; None where no run was over this kit. Raises UserError where the file is damaged."""
    file = kit / FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it: the next run writes it anew") from error


def runs_now(kit: Path) -> bool:
    """Whether a program holds the standing open: what it says is of now."""
    try:
        with (kit / ".running").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _shared(kit: Path) -> TextIO | None:
    """Held while a run goes on; the system lets go of it when the process dies, however it does."""
    file = kit / ".running"
    with contextlib.suppress(OSError):
        file.touch(0o600)
        held = file.open("r")
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return held
    return None


def lines(kit: Path, silos: Sequence[str], connected: Mapping[str, float] | None) -> Iterator[str]:
    """What `fedtailor status` prints. connected: when each silo that is at the server was last seen; None: not known."""
    known, now = read(kit), time.time()
    if known is None:
        yield "no run yet"
    else:
        yield _run(known, runs_now(kit), now, kit)
    for silo in silos:
        here = connected is not None and silo in connected
        seen = f"last seen {_ago(now - connected[silo])}" if connected and here else "not connected"
        parts = ["connection not known" if connected is None else seen]
        one = {} if known is None else known["silos"].get(silo, {})
        parts += [f"{what} {one[what]}" for what in ("fedtailor", "torch") if what in one]
        if "answered" in one:
            parts.append(f"last answer {_ago(now - one['answered'])}")
        if another_base(known, silo):
            parts.append(f"cannot take part: its base model is another one (sha256 {one['model_sha256'][:12]})")
        if one.get("lost") and (one["lost_at"] >= one.get("answered", 0.0)):
            parts.append(f"missing {_ago(now - one['lost_at'])}: {one['lost']}")
        yield f"{silo}: {', '.join(parts)}"


def another_base(known: Mapping[str, Any] | None, silo: str) -> bool:
    """Whether this silo opened the run with another base model than the run's."""
    if known is None:
        return False
    its, ours = known["silos"].get(silo, {}).get("model_sha256"), known.get("model_sha256")
    return bool(its and ours and its != ours)


def _run(known: Mapping[str, Any], now_running: bool, now: float, kit: Path) -> str:
    begin = f"run {known['run']}: "
    if not now_running and "ended" in known:
        return f"{begin}finished {_ago(now - known['ended'])}"
    where = "nothing asked yet"
    if "round" in known:
        row = known["at"].split("/")[1:-1]
        where = f"{row[0]}, round {known['round']} of {known['rounds']}" if row else "test rows"
    if not now_running:
        resume = f"fedtailor run --resume {shlex.quote(known['run'])} --federation {shlex.quote(str(kit))}"
        return f"{begin}stopped ({where}); go on with: {resume}"
    since = f" for {_span(now - known['round_since'])}" if "round" in known else ""
    return f"{begin}{where}{since}; begun {_ago(now - known['since'])}"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    """12 s, 3 min, 5 h, 4 days."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
