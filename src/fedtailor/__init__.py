"""Federated customization of large models. What the command line does, with the same names:

    import fedtailor

    result = fedtailor.run("experiments/tiny.toml", sets=["method.lr=0.02"], out="runs/mine")
    print(result["rows"]["federated"]["accuracy"]["mean"])

Over silos elsewhere (docs/federation.md): `fedtailor.run("urgency.toml", federation="kits/server")`.
The other commands: `fedtailor.report.write(folder)` and `.markdown(result)`, `find.methods()`, `packaged.listing()` and
`packaged.folder(name)`, `demo.names()` and `demo.fetch(name)`, `chatting.talk(folder, console, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def run(
    file: str | Path | None = None,
    sets: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    federation: str | Path | None = None,
) -> dict[str, Any]:
    """Run an experiment file, or go on with the run of a folder. Returns the result, which is in the folder too.

    `federation`: the server's kit, for a run over silos elsewhere.
    """
    from fedtailor import report, runs

    kit, begun, resumed, folder = (None if path is None else Path(path) for path in (federation, file, resume, out))
    with runs.over(kit, begun, resumed, sets, seed, folder, "from Python") as one:
        result = one.conduct()
    report.write(one.folder)
    return result


def check(file: str | Path, sets: Sequence[str] = (), seed: int | None = None) -> None:
    """Validate an experiment with its data and model, and print what would leave each silo."""
    from rich.console import Console

    from fedtailor import checking, experiment

    checking.show(experiment.load(Path(file), sets, seed), Console())
