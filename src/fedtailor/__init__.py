"""Federated customization of large models. What the command line does, with the same names:

    import fedtailor

    result = fedtailor.run("experiments/tiny.toml", sets=["method.lr=0.02"], out="runs/mine")
    print(result["rows"]["federated"]["accuracy"]["mean"])

The table and the page are `fedtailor.report.markdown(result)` and `fedtailor.report.write(folder)`.
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
) -> dict[str, Any]:
    """Run an experiment file, or go on with the run of a folder. Returns the result, which is in the folder too."""
    from fedtailor import experiment, report, runs
    from fedtailor.errors import UserError

    if (file is None) == (resume is None):
        raise UserError("run: give an experiment file, or resume=FOLDER")
    if resume is not None:
        one = runs.resume(Path(resume))
    else:
        asked = experiment.load(Path(str(file)), sets, seed)
        one = runs.begin(asked, None if out is None else Path(out), "from Python")
    result = one.conduct()
    report.write(one.folder)
    return result


def check(file: str | Path, sets: Sequence[str] = (), seed: int | None = None) -> None:
    """Validate an experiment with its data and model, and print what would leave each silo."""
    from rich.console import Console

    from fedtailor import checking, experiment

    checking.show(experiment.load(Path(file), sets, seed), Console())
