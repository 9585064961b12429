"""`fedtailor check` and `fedtailor methods`: what an experiment would do, and what would leave each silo."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor import find, models, wire
from fedtailor.data import SiloData
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment, drawn
from fedtailor.preparing import prepare

TRAINED_BESIDES = (
    "Besides: once, before the first round, the untrained tensors from one silo; rows seen, mean loss; at evaluation: sums "
    "and counts (of a silo with one row: that row's). No rows, texts or tokens leave."
)
LABELS = 3  # of the classifier whose head is counted, on an encoder


def show(experiment: Experiment, out: Console, afar: Sequence[str] = ()) -> None:
    """Print silos, rows, and per silo the tensors and bytes of a round. Raises UserError for whatever cannot run.

    `afar`: silos that keep their rows themselves; `fedtailor doctor` looks at them there.
    """
    loaded, resident = prepare(experiment, afar)
    method = experiment.method
    turns = min(2, experiment.rounds)  # a method may train one part in odd rounds, another in even ones
    labels = len(_labels(loaded.silos))
    bodies = [method.example(resident, labels, n) for n in range(1, turns + 1)] if hasattr(method, "example") else []
    if afar:
        out.print(f"silos, each with rows of its own: {', '.join(afar)}", markup=False, highlight=False, soft_wrap=True)
    table = Table("silo", "train", "val", "test", "dropped", title="rows")
    for name, rows in () if afar else loaded.silos.items():
        table.add_row(
            escape(name),
            *(str(len(part)) for part in (rows.train, rows.val, rows.test)),
            str(loaded.dropped.get(name, 0)),
        )
    if not afar:
        out.print(table)
    if not bodies:
        out.print(f"{type(method).__name__} does not say what leaves a silo", highlight=False)
        return
    leaving = list(dict.fromkeys(one for body in bodies for one in wire.leaving(body)))
    table = Table("tensor", "shape", "dtype", title="leaves each silo, each round")
    for tensor, shape, dtype in leaving:
        table.add_row(escape(tensor), " x ".join(map(str, shape)), dtype)
    out.print(table)
    sizes = [len(wire.pack(body)) for body in bodies]
    whole = sum(sizes[n % turns] for n in range(experiment.rounds))
    size, count = whole // experiment.rounds, sum(math.prod(shape) for _, shape, _ in leaving)
    silos = drawn(len(loaded.silos), experiment.participation)
    out.print(
        f"{count:,} numbers, about {size:,} bytes up per silo and round; {silos} of {len(loaded.silos)} silos a round, "
        f"{experiment.rounds} rounds: {whole * silos:,} bytes up in all",
        highlight=False,
    )
    out.print(getattr(method, "BESIDES", TRAINED_BESIDES), highlight=False, markup=False)


def _labels(silos: dict[str, SiloData]) -> tuple[str, ...]:
    return next((rows.labels for rows in silos.values() if rows.labels), ())


def list_methods(out: Console, model: str = "smollm2-135m") -> None:
    """Every method with its own settings, and what it costs on that model. Raises UserError where there is none."""
    from fedtailor.methods.averaging import Averaging

    resident = models.load(models.Base(model))
    table = Table("method", "what", "trained", "up", "cohort", title=f"on {escape(model)}")
    for name, kind in find.methods().items():
        doc = (__import__(kind.__module__, fromlist=["_"]).__doc__ or "").strip()
        what = re.split(r"[:;,.](?:\s|$)", doc.replace("et al.", "et al"), maxsplit=1)[0].replace("et al", "et al.")
        table.add_row(name, escape(what), *_costs(kind(), resident))
    out.print(table)
    out.print("trained: numbers; up: bytes of one silo and round; cohort: many silos in one pass", highlight=False)
    out.print("Settings of each:", highlight=False)
    for name, kind in find.methods().items():
        out.print(escape(f"  {name}: {', '.join(f'{f.name} = {_default(f)}' for f in _own(kind))}"), highlight=False)
    shared = ", ".join(f"{f.name} = {_default(f)}" for f in fields(Averaging))
    out.print(escape(f"Settings of all of them: {shared}"), highlight=False)


def _costs(method: Any, resident: models.Resident) -> tuple[str, str, str]:
    try:
        body = method.example(resident, LABELS)
    except UserError as error:
        return str(error).partition(":")[0].removeprefix("[method] "), "-", "-"
    delta = getattr(body, "delta", None)  # without control variates, which are not trained
    numbers = sum(t.numel() for t in (delta if isinstance(delta, dict) else wire.tensors_of(body)).values())
    return f"{numbers:,}", f"{len(wire.pack(body)):,}", "no" if getattr(method, "one_by_one", False) else "yes"


def _own(kind: type[Any]) -> list[Any]:
    from fedtailor.methods.averaging import Averaging

    shared = {f.name: f.default for f in fields(Averaging)} if issubclass(kind, Averaging) else {}
    return [f for f in fields(kind) if shared.get(f.name, MISSING) != f.default]


def _default(item: Any) -> str:
    return "(needed)" if item.default is MISSING else repr(item.default)
