"""`fedtailor check` and `fedtailor methods`: what an experiment would do, and what would leave each silo."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor import answering, find, models, wire
from fedtailor import data as rows_of
from fedtailor.data import SiloData
from fedtailor.errors import SiloError, UserError
from fedtailor.experiment import Experiment


def show(experiment: Experiment, out: Console) -> None:
    """Print silos, rows, and per silo the tensors and bytes of a round. Raises UserError for whatever cannot run."""
    loaded = rows_of.load(experiment.data, experiment.silo, experiment.seeds[0])
    experiment.faults.check(loaded.silos)
    resident = models.load(experiment.model)
    method = experiment.method
    # first: whether the method fits the model at all
    body = method.example(resident, len(_labels(loaded.silos))) if hasattr(method, "example") else None
    fits(resident, loaded.silos, taken=getattr(method, "virtual_tokens", 0))
    table = Table("silo", "train", "val", "test", "dropped", title="rows")
    for name, rows in loaded.silos.items():
        table.add_row(
            escape(name),
            *(str(len(part)) for part in (rows.train, rows.val, rows.test)),
            str(loaded.dropped.get(name, 0)),
        )
    out.print(table)
    if body is None:
        out.print(f"{type(method).__name__} does not say what leaves a silo", highlight=False)
        return
    leaving = wire.leaving(body)
    table = Table("tensor", "shape", "dtype", title="leaves each silo, each round")
    for tensor, shape, dtype in leaving:
        table.add_row(escape(tensor), " x ".join(map(str, shape)), dtype)
    out.print(table)
    size = len(wire.pack(body))
    count = sum(t.numel() for t in wire.tensors_of(body).values())
    silos = max(1, round(experiment.participation * len(loaded.silos)))
    out.print(
        f"{count:,} numbers, about {size:,} bytes up per silo and round; {silos} of {len(loaded.silos)} silos a round, "
        f"{experiment.rounds} rounds: {size * silos * experiment.rounds:,} bytes up in all",
        highlight=False,
    )
    out.print(
        "Besides: rows seen, mean loss; at evaluation: sums and counts. No rows, texts or tokens leave.",
        highlight=False,
    )


def _labels(silos: dict[str, SiloData]) -> tuple[str, ...]:
    return next((rows.labels for rows in silos.values() if rows.labels), ())


def fits(resident: models.Resident, silos: dict[str, SiloData], taken: int = 0) -> None:
    """Every row fits the model's context beside `taken` virtual tokens. Raises UserError naming the first that does not."""
    for name, rows in silos.items():
        for split in ("train", "val", "test"):
            part = getattr(rows, split)
            # a token is at least one byte: only rows that could be too long are tokenized
            long = [row for row in part if _bytes(row) >= resident.context - taken]
            try:
                if long and not resident.classifier:
                    answering.encode(resident, long, stop=True, taken=taken)
            except SiloError as error:
                raise UserError(f"silo {name!r}, {split}: {error}") from error


def list_methods(out: Console) -> None:
    table = Table("method", "what", "its own settings")
    for name, kind in find.methods().items():
        doc = (__import__(kind.__module__, fromlist=["_"]).__doc__ or "").strip().split("\n")[0]
        table.add_row(name, escape(doc), escape(", ".join(f"{f.name} = {_default(f)}" for f in _own(kind))))
    out.print(table)
    from fedtailor.methods.averaging import Averaging

    shared = ", ".join(f"{f.name} = {_default(f)}" for f in fields(Averaging))
    out.print(escape(f"Settings of all of them: {shared}"), highlight=False)


def _own(kind: type[Any]) -> list[Any]:
    from fedtailor.methods.averaging import Averaging

    shared = {f.name: f.default for f in fields(Averaging)} if issubclass(kind, Averaging) else {}
    return [f for f in fields(kind) if shared.get(f.name, MISSING) != f.default]


def _default(item: Any) -> str:
    return "(needed)" if item.default is MISSING else repr(item.default)


def _bytes(row: rows_of.Row) -> int:
    turns = sum(len(turn["content"].encode()) + 32 for turn in row.messages)
    return len(row.prompt.encode()) + len(row.answer.encode()) + turns + 2
