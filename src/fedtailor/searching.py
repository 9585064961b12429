"""The server's side of a prompt search: what it knows, and one exchange with silos that need not all be equally far.

A silo that missed a round or an exchange, or joined later, is asked from where it is. As long as all are equally far, that
is one exchange; else one for each place that some silos are at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedtailor import progress, tally, trying
from fedtailor.core import Ask
from fedtailor.errors import RunError
from fedtailor.prompts import Prompt, shown
from fedtailor.tally import Tally
from fedtailor.trying import Tried, Try

Windows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class State:
    """The server's: every candidate there ever was, what is known of each, who is in the running."""

    pool: tuple[Prompt, ...]
    origins: tuple[str, ...]  # "hand", or the proposer
    known: Tally
    running: tuple[int, ...]  # the best first
    best: int
    silos: tuple[str, ...]
    labels: tuple[str, ...]
    order: int
    skipped: int = 0  # proposals that could not be used
    declined: int = 0  # replies of silos that would say something of more rows only
    epsilon: float = 0.0  # spent, as silos said, of the row that has told most
    floors: tuple[int, ...] = ()  # by silo: rows, below which it says nothing, as far as it has said so
    quiet: tuple[str, ...] = ()  # silos that did not answer when they were last asked
    notes: Mapping[str, float] = field(default_factory=dict)

    def floor(self, silo: str) -> int:
        place = self.silos.index(silo)
        return self.floors[place] if place < len(self.floors) else 1


def begun(state: State, ask: Ask) -> State:
    """At the start of a round: with silos that joined, and heard by those of the round that answer."""
    new = tuple(name for name in ask.silos if name not in state.silos)
    known = state.known.joined(len(new)) if new else state.known
    state = replace(state, silos=(*state.silos, *new), known=known)
    return replace(state, known=state.known.begun(_answering(state, ask)))


def tried(state: State, wants: Mapping[int, int], ask: Ask, form: Try, calls: int) -> State:
    """After an exchange about these candidates, up to these rows. `form`: what is asked, without prompts and windows.

    A silo with a minimum of its own is asked for so many rows, unless these are more than `calls`. One that is not heard is
    asked again with the next; the others do not wait for it. Raises RunError where none is heard.
    """
    asked = dict(sorted(wants.items()))
    groups = _groups(state, asked, ask.silos, calls)
    replies: list[tuple[int, Tried]] = []
    known, failed = state.known, list[RunError]()
    for windows, names in groups.items():
        body = replace(form, prompts=tuple(state.pool[c] for c in asked), windows=windows)
        try:
            some = [(state.silos.index(reply.silo), reply.body) for reply in ask(trying.attempt, body, to=names)]
        except RunError as error:
            failed.append(error)
            continue
        known = tally.folded(known, {c: end for c, (_, end) in zip(asked, windows, strict=True)}, some)
        replies += some
    if failed and (len(groups) == 1 or not replies):
        raise failed[0]
    state = _heard(replace(state, known=known), [name for names in groups.values() for name in names], replies)
    state = replace(state, known=replace(state.known, present=_mask(state, _answering(state, ask))))
    return _without_misfits(state, tuple(asked), replies)


def _groups(state: State, asked: Mapping[int, int], silos: Sequence[str], calls: int) -> dict[Windows, list[str]]:
    """Windows -> the silos that are asked for these. Who has nothing to do is asked nothing."""
    groups: dict[Windows, list[str]] = {}
    everyones = state.known.asked
    for name in silos:
        place, floor = state.silos.index(name), state.floor(name)
        floor = floor if floor * len(asked) <= calls else 1
        windows: list[tuple[int, int]] = []
        for c, end in asked.items():
            at = int(state.known.reached[c, place])
            if state.known.ended[c, place]:  # no row of its lies there: asked as the others are, it needs no exchange of its own
                at = max(at, int(everyones[c]))
                windows.append((at, max(at, end)))
            else:
                windows.append((at, max(end, at + floor) if end > at else at))
        if any(begin < end for begin, end in windows):
            groups.setdefault(tuple(windows), []).append(name)
    return groups


def _heard(state: State, names: Sequence[str], replies: Sequence[tuple[int, Tried]]) -> State:
    """With what replies say beside the sums, and who of those asked sent none."""
    floors = [state.floor(name) for name in state.silos]
    for silo, reply in replies:
        floors[silo] = reply.least
    answered = {state.silos[silo] for silo, _ in replies}
    quiet = tuple(name for name in state.silos if name not in answered and (name in names or name in state.quiet))
    declining = sum(any(more and not n for more, n in zip(r.more, r.counts.tolist(), strict=True)) for _, r in replies if r.more)
    epsilon = max([state.epsilon, *(reply.epsilon for _, reply in replies)])
    return replace(state, floors=tuple(floors), quiet=quiet, declined=state.declined + declining, epsilon=epsilon)


def _answering(state: State, ask: Ask) -> list[int]:
    """The silos of the round without those that were not heard when last asked, unless these are all."""
    names = [name for name in ask.silos if name not in state.quiet] or ask.silos
    return [state.silos.index(name) for name in names]


def _mask(state: State, silos: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(len(state.silos), dtype=torch.bool)
    mask[list(silos)] = True
    return mask


def _without_misfits(state: State, asked: Sequence[int], replies: Sequence[tuple[int, Tried]]) -> State:
    """A candidate that does not fit some silo's rows is out of the running, and counted."""
    out = {c for i, c in enumerate(asked) if any(reply.unfit[i] for _, reply in replies)} & set(state.running)
    for c in sorted(out):
        progress.line(f"skipped, too long for some row: {shown(state.pool[c])}")
    running = tuple(c for c in state.running if c not in out)
    if not running:
        raise RunError("no prompt fits the rows of every silo in the model's context; shorten the prompts or set data.max_words")
    return replace(state, running=running, skipped=state.skipped + len(out))
