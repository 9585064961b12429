"""`fedtailor study`: from a file, or from a table of rows alone, to a report."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fedtailor.study.grid import Study

out, err = Console(), Console(stderr=True)

Column = Annotated[str, typer.Option(help="of --data")]


def study(
    file: Annotated[Path | None, typer.Argument(help="the study, a TOML file with [[part]] tables")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="base.part.key=value, over the file; may be repeated")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="the study's folder; default runs/<name>, gone on with")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="instead of a file: rows of yours, .jsonl .csv .parquet")] = None,
    silo_column: Annotated[str, typer.Option("--silo-column", help="of --data: who owns the row")] = "",
    text: Annotated[str, typer.Option("--text", help="of --data: the column to read; guessed")] = "",
    label: Annotated[str, typer.Option("--label", help="of --data: the column of labels; guessed")] = "",
    answer: Annotated[str, typer.Option("--answer", help="of --data: or that of texts to write")] = "",
    model: Annotated[str, typer.Option("--model", help="for --data; default minilm for labels, smollm2-135m for texts")] = "",
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="for --data: how many; default 3")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="processes that share the work, each with a base of its own")] = 1,
    background: Annotated[bool, typer.Option("--background", help="go on without this terminal")] = False,
    only: Annotated[bool, typer.Option("--report", help="run nothing: the report of what is finished")] = False,
    track: Annotated[str | None, typer.Option("--track", help="also to trackio, mlflow, tensorboard or wandb")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Run a grid of experiments, or go on with it, and write tables, plots and findings. Finished runs are not repeated."""
    from fedtailor import experiment, tracking
    from fedtailor.errors import RunError, UserError
    from fedtailor.study import conduct, grid, measured

    _plots_can_be_made()
    tracking.to(track)
    if (file is None) == (data is None):
        raise UserError("name a study's file, or --data ROWS.jsonl --silo-column COLUMN")
    asked = {"--silo-column": silo_column, "--text": text, "--label": label, "--answer": answer, "--model": model}
    if file is not None and (mine := [name for name, given in asked.items() if given] + ["--seeds"] * (seeds is not None)):
        told = "goes with --data; what a file says is changed with --set, such as --set base.model.name=..."
        raise UserError(f"{', '.join(mine)}: {told}")
    if data is not None:
        from fedtailor.study import own

        if not silo_column:
            raise UserError(f"--data {data}: say which column tells whose a row is: --silo-column COLUMN")
        table, told = own.table(data, silo_column, text, label, answer, model, seeds or 3)
        for one in sets or ():
            experiment.set_over(table, one)
        found = grid.parse(table, f"--data {data}")
        if not worker:
            err.print(told, markup=False, highlight=False, soft_wrap=True)
    else:
        assert file is not None
        found = grid.load(file, sets or [])
    root = folder or Path("runs") / found.name
    command = "fedtailor " + shlex.join(a for a in sys.argv[1:] if a not in ("--background", "--worker"))
    if not only:
        conduct.begin(found, root, made=data is not None)
    elif not root.is_dir():
        raise UserError(f"{root}: no study there yet; run it without --report")
    if background and not only:
        _detached(root)
        return
    failed: dict[str, str] = {}
    if not only:
        cells = found.runs()
        done = sum(not conduct.missing_rows(conduct.folder_of(root, c), c.experiment.rows) for c in cells)
        if not worker:
            err.print(f"{root}: {len(cells)} runs, {done} finished", markup=False, highlight=False, soft_wrap=True)
        if data is not None and not worker and done < len(cells):
            err.print(_about(found, root), markup=False, highlight=False, soft_wrap=True)
        failed = _conducted(found, root, command, 1 if worker else jobs)
    if worker:
        return
    rows = measured.read(found, root)
    if not rows:
        if only:
            raise UserError(f"{root}: nothing is finished yet; run it without --report")
        raise RunError(f"{root}: nothing could be finished; {next(iter(failed.values()))}")
    from fedtailor.study import findings, page

    report = page.write(found, rows, root)
    for said in findings.findings(found, rows):
        out.print(said.text, markup=False, highlight=False, soft_wrap=True)
    out.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        first = next(iter(failed.items()))
        raise RunError(f"{len(failed)} runs failed, first {first[0]}: {first[1]}; once mended, the same command tries them again")


def _about(found: Study, root: Path) -> str:
    from fedtailor.figures import duration
    from fedtailor.study import estimate

    seconds = sum(cost.seconds for cost in estimate.of(found, root).values())
    more = f"--jobs 2 shares it between two; {root / 'study.toml'} can be changed, and run"
    return f"about {duration(seconds)} in one process; {more}"


def _plots_can_be_made() -> None:
    from importlib.util import find_spec

    from fedtailor.errors import UserError

    if find_spec("matplotlib") is None:
        raise UserError("a study's plots need fedtailor[study]: pip install 'fedtailor[study]'")


def _conducted(found: Study, root: Path, command: str, jobs: int) -> dict[str, str]:
    """Run the cells in this process and in `jobs` - 1 others. Returns those that failed, and why."""
    from fedtailor.study import conduct

    # whoever started this may have had it ignore Ctrl-C, as a script's & does; and an end asked for ends the others, too
    before = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGINT, signal.SIGTERM)}
    others = [_started([*_mine(), "--worker"], root / f"worker-{number}.log") for number in range(2, jobs + 1)]
    try:
        conduct.conduct(found, root, command)
        for other in others:
            other.wait()
    except KeyboardInterrupt:
        err.print(f"stopped; go on with: {command}", markup=False, highlight=False, soft_wrap=True)
        raise
    finally:
        for other in others:
            if other.poll() is None:
                other.terminate()
        for one, handler in before.items():
            signal.signal(one, handler)
    return conduct.failures(found, root)


def _mine() -> list[str]:
    """This command's own arguments, but for those of who starts others."""
    return [argument for argument in sys.argv[1:] if argument != "--background"]


def _started(arguments: Sequence[str], log: Path, **how: Any) -> subprocess.Popen[bytes]:
    with log.open("ab") as told:
        return subprocess.Popen(
            [sys.executable, "-c", "from fedtailor.cli import main; main()", *arguments],
            stdin=subprocess.DEVNULL, stdout=told, stderr=told, **how,
        )  # fmt: skip


def _detached(root: Path) -> None:
    log = root / "study.log"
    process = _started(_mine(), log, start_new_session=True, env={**os.environ, "COLUMNS": "120"})
    told = f"running as process {process.pid}; follow it with: tail -f {log}; stop it with: kill {process.pid}"
    out.print(told, markup=False, highlight=False, soft_wrap=True)


def checked(file: Path, sets: Sequence[str], console: Console) -> bool:
    """`fedtailor check` of a study: runs, time and bytes by part. False for a file that is no study."""
    from rich.table import Table

    from fedtailor import experiment
    from fedtailor.figures import duration, size
    from fedtailor.study import estimate, grid

    if not grid.is_study(experiment.read(file)):
        return False
    found = grid.load(file, sets)
    costs = estimate.of(found, Path("runs") / found.name)
    view = Table("part", "runs", "finished", "about", "up", "down", title=found.name)
    for name, cost in costs.items():
        about = duration(cost.seconds) + (f" and {cost.unknown} runs not known" if cost.unknown else "")
        view.add_row(name, str(cost.cells), str(cost.finished), about, size(cost.up), size(cost.down))
    console.print(view)
    total = sum(cost.seconds for cost in costs.values())
    runs = sum(cost.cells for cost in costs.values())
    told = f"{runs} runs to do, about {duration(total)} in one process; --jobs shares them among processes"
    console.print(told, highlight=False, soft_wrap=True)
    return True
