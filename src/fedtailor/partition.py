"""Rows without natural owners, dealt out to silos. The dealing itself is `flwr_datasets.partitioner`'s.

All splits are dealt together, and a row keeps its split: each silo gets train, val and test rows of one distribution,
and the test rows of a data set are the same rows whatever the partition, the number of silos or the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from fedtailor.errors import UserError

Kind = Literal["iid", "dirichlet", "label", "size"]


def partition(
    kind: Kind,
    keys: Sequence[str],
    classes: Sequence[str],
    train: Sequence[bool],
    *,
    silos: int,
    seed: int,
    alpha: float = 0.5,
    labels_per_silo: int = 1,
) -> dict[str, list[int]]:
    """Silo name -> indices of its rows, ascending; every row in exactly one silo, every silo with a training row.

    `iid`: equal sizes, at most one row apart. `size`: sizes that grow linearly, the last silo's about `silos` times
    the first's. `dirichlet`: each class is divided in proportions from Dirichlet(alpha) (Hsu et al. 2019, arXiv
    1909.06335; 0.1 is a strong skew, 100 almost none). `label`: each silo holds `labels_per_silo` classes only
    (McMahan et al. 2017, arXiv 1602.05629).

    `keys[i]` is the content of row i, `classes[i]` its label word (used by `dirichlet` and `label`), `train[i]` whether
    it may be trained on. The order of the rows does not matter, only their keys and `seed`: the same rows in another
    order are dealt to the same silos. A silo left without a training row gets one from the silo with the most.
    """
    if sum(train) < silos:
        raise UserError(
            f"[data] partition: {silos} silos need a training row each, and there are {sum(train)}; set silos to "
            f"{sum(train)} or fewer"
        )
    # Not the hash of the splits: rows in that order would put all test rows into the first silo.
    order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"deal {seed} {keys[i]}".encode()).digest())
    words = sorted(set(classes))
    code = {word: number for number, word in enumerate(words)}
    if kind == "label":
        _check_labels(words, classes, silos, labels_per_silo)
    dealt = _deal(kind, [code[classes[i]] for i in order], silos, seed, alpha, labels_per_silo)
    members = [[order[position] for position in positions] for positions in dealt]
    _lend_training_rows(members, train)
    width = max(2, len(str(silos - 1)))
    return {f"silo_{number:0{width}d}": sorted(rows) for number, rows in enumerate(members)}


def _deal(kind: Kind, codes: list[int], silos: int, seed: int, alpha: float, labels_per_silo: int) -> list[list[int]]:
    from datasets import Dataset
    from flwr_datasets import partitioner as flwr

    dealer: Any
    match kind:
        case "iid":
            dealer = flwr.IidPartitioner(silos)
        case "size":
            dealer = flwr.SizePartitioner(_sizes(len(codes), silos))
        case "dirichlet":
            dealer = flwr.DirichletPartitioner(
                silos, "label", float(alpha), min_partition_size=0, shuffle=False, seed=seed
            )
        case "label":
            dealer = flwr.PathologicalPartitioner(
                silos, "label", labels_per_silo, class_assignment_mode="deterministic", shuffle=False, seed=seed
            )
    dealer.dataset = Dataset.from_dict({"label": codes, "row": list(range(len(codes)))})
    return [list(dealer.load_partition(number)["row"]) for number in range(silos)]


def _sizes(rows: int, silos: int) -> list[int]:
    """One row each, the rest in proportion to 1, 2, 3, ...; they add up to `rows`. (4 silos, 14 rows: 2, 3, 4, 5.)"""
    total = silos * (silos + 1) // 2
    ends = [(rows - silos) * k * (k + 1) // 2 // total for k in range(silos + 1)]
    return [1 + ends[k + 1] - ends[k] for k in range(silos)]


def _check_labels(words: list[str], classes: Sequence[str], silos: int, labels_per_silo: int) -> None:
    if labels_per_silo > len(words):
        raise UserError(
            f"[data] labels_per_silo is {labels_per_silo}, and the data has {len(words)} labels ({', '.join(words)}); "
            f"set it to {len(words)} or fewer"
        )
    holders = dict.fromkeys(words, 0)
    for silo in range(silos):
        for step in range(labels_per_silo):
            holders[words[(silo + step) % len(words)]] += 1
    if nobody := [word for word in words if not holders[word]]:
        raise UserError(
            f"[data] partition 'label': with {silos} silos of {labels_per_silo} labels each, nobody would hold "
            f"{', '.join(nobody)}; raise silos or labels_per_silo"
        )
    for word in words:
        if (rows := sum(value == word for value in classes)) < holders[word]:
            raise UserError(
                f"[data] partition 'label': {holders[word]} silos would share the {rows} rows of label {word!r}; "
                f"lower silos or labels_per_silo"
            )


def _lend_training_rows(members: list[list[int]], train: Sequence[bool]) -> None:
    """In place. Dirichlet shares of a thousand silos always leave some with nothing, which is not a silo at all."""
    counts = [sum(train[row] for row in rows) for rows in members]
    for silo, count in enumerate(counts):
        if count == 0:
            richest = max(range(len(members)), key=lambda other: (counts[other], -other))
            row = next(row for row in reversed(members[richest]) if train[row])
            members[richest].remove(row)
            members[silo].append(row)
            counts[richest] -= 1
            counts[silo] = 1
