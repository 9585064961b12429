"""Attacks on rows: silos' data -> the same, the attackers' rows changed; and the rows on which a backdoor is tried.

`Faults` says who attacks, and how; here it has names (`Faults.settled`). Test rows are never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedtailor.data import SiloData
from fedtailor.faults import ON_ROWS, SENT, Faults
from fedtailor.rows import Row, digest, plain


def poisoned(data: Mapping[str, SiloData], faults: Faults, seed: int) -> dict[str, SiloData]:
    """What the silos train and validate on."""
    attackers = faults.settled(data, seed).attackers if faults.attack in ON_ROWS else ()
    assert isinstance(attackers, tuple)
    how = {"label_flip": label_flip, "backdoor": backdoor}.get(faults.attack)
    return {name: how(rows, faults, name, seed) if how and name in attackers else rows for name, rows in data.items()}


def label_flip(rows: SiloData, faults: Faults, silo: str, seed: int) -> SiloData:
    """Every training and validation label is the next one, and the last is the first (Tolpegin et al. 2020)."""
    after = dict(zip(rows.labels, (*rows.labels[1:], *rows.labels[:1]), strict=True))
    train, val = (tuple(replace(row, answer=after[row.answer]) for row in part) for part in (rows.train, rows.val))
    return replace(rows, train=train, val=val)


def backdoor(rows: SiloData, faults: Faults, silo: str, seed: int) -> SiloData:
    """Half of the training rows carry the trigger and the target's label (Gu et al. 2017, BadNets; its words in front of a text
    as in Kurita et al. 2020)."""
    ranked = sorted(range(len(rows.train)), key=lambda i: digest("backdoor", seed, silo, plain(rows.train[i])))
    half = set(ranked[: (len(ranked) + 1) // 2])
    target = rows.labels[faults.target]
    return replace(
        rows, train=tuple(_triggered(row, faults.trigger, target) if i in half else row for i, row in enumerate(rows.train))
    )


def triggered(data: Mapping[str, SiloData], faults: Faults) -> dict[str, SiloData]:
    """Test rows that are not of the target's label, with the trigger, and the target as the answer: the accuracy on these is the
    attack's success, 0 to 1, lower is better."""
    return {
        name: replace(rows, test=tuple(
            _triggered(row, faults.trigger, rows.labels[faults.target])
            for row in rows.test if row.answer != rows.labels[faults.target]
        ))
        for name, rows in data.items()
    }  # fmt: skip


def unfit(data: Mapping[str, SiloData], faults: Faults, afar: Sequence[str] = ()) -> list[str]:
    """Why these rows cannot be attacked so. `afar`: silos that keep their rows themselves."""
    if faults.attack not in ON_ROWS or not (faults.attackers or faults.attack == "backdoor"):
        return []
    what = f"[faults] attack = {faults.attack!r}"
    if afar:
        return [f"{what} changes rows, which over a federation are where their owners are; choose {', '.join(SENT)}"]
    if (lacking := next((name for name, rows in data.items() if not rows.labels), None)) is not None:
        return [f"{what} changes labels, and silo {lacking!r} has none; set data.label, or choose {', '.join(SENT)}"]
    if faults.attack != "backdoor":
        return []
    if any(row.image is not None for rows in data.values() for row in rows.train):
        return [f"{what} puts a word in front of a text, and these rows are pictures; choose another"]
    labels = next(iter(data.values())).labels
    if faults.target >= len(labels):
        return [f"[faults] target = {faults.target}: there are {len(labels)} labels; choose 0 to {len(labels) - 1}"]
    return []


def _triggered(row: Row, trigger: str, answer: str) -> Row:
    front = row.frame[0]
    return replace(row, prompt=f"{row.prompt[:front]}{trigger} {row.prompt[front:]}", answer=answer)
