"""`fedtailor ask`: a question to silos' documents, answered as it is written, or a page where one asks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtailor.retrieval.answered import Answered
    from fedtailor.retrieval.session import Session


def ask(
    question: Annotated[str, typer.Argument(help="in plain words")] = "",
    index: Annotated[list[str] | None, typer.Option("--index", help="NAME=FILE, a silo's index; may be repeated")] = None,
    file: Annotated[Path | None, typer.Option("--experiment", help="whose corpora, model and settings are used")] = None,
    folder: Annotated[Path | None, typer.Option("--run", help="a finished run of rag")] = None,
    federation: Annotated[Path | None, typer.Option("--federation", help="over silos elsewhere: the server's kit")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="part.key=value; may be repeated")] = None,
    model: Annotated[str, typer.Option("--model", help="which answers, without --experiment")] = "smollm2-135m",
    web: Annotated[bool, typer.Option("--web", help="a page to ask on, in place of one question")] = False,
    port: Annotated[int, typer.Option("--port", help="of the page", min=0, max=65535)] = 7860,
) -> None:
    """Ask silos' documents: what is found where, an answer, and its sources."""
    from fedtailor.errors import UserError

    if bool(question.strip()) == web:
        raise UserError("ask a question, in quotes, or --web for a page; not both")
    with _session(index or [], file, folder, federation, sets or [], model) as session:
        if web:
            from fedtailor.retrieval import page

            page.serve(session, port=port)
        else:
            _shown(session.ask(question))


@contextlib.contextmanager
def _session(
    indexes: Sequence[str], file: Path | None, folder: Path | None, federation: Path | None, sets: Sequence[str], model: str
) -> Iterator[Session]:
    from fedtailor import experiment as experiments
    from fedtailor.errors import UserError
    from fedtailor.retrieval import session

    if sum(map(bool, (indexes, folder, federation))) + bool(file and not (indexes or folder or federation)) != 1:
        ways = "--index NAME=FILE for each silo, --experiment FILE, --run FOLDER or --federation KIT"
        raise UserError(f"say whose documents: {ways}")
    if folder is not None:
        if file or sets:
            raise UserError("--experiment and --set do not go with --run: it asks as it was made")
        yield session.of_run(folder)
        return
    asked = session.plain(model, sets) if file is None else experiments.load(file, sets)
    session.needed(asked, str(file))
    if federation is not None:
        with session.of_federation(asked, federation) as made:
            yield made
    elif indexes:
        yield session.of_indexes(asked, _named(indexes))
    else:
        yield session.of_experiment(asked)


def _named(indexes: Sequence[str]) -> dict[str, Path]:
    from fedtailor.errors import UserError

    found = dict[str, Path]()
    for one in indexes:
        name, equals, path = one.rpartition("=")
        name = name if equals else Path(one).stem
        if not name or "/" in name or name in found:
            raise UserError(f"--index {one}: write NAME=FILE, each name once and without a slash")
        found[name] = Path(path)
    return found


def _shown(pieces: Iterator[Answered]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from fedtailor.figures import clean, duration

    out, now = Console(highlight=False), None
    if out.is_terminal:
        with Live(console=out, vertical_overflow="visible", auto_refresh=False) as live:
            for now in pieces:
                live.update(Text(clean(now.text)), refresh=True)
    else:
        *_, now = pieces
        out.print(clean(now.text if now else ""), markup=False, soft_wrap=True)
    if now is None:
        return
    for source in now.sources:
        text = " ".join(clean(source.text).split())
        out.print(f"\n{clean(source.cited)} {source.score:.3f}", markup=False, soft_wrap=True)
        out.print(f"  {text[:300]}{'...' if len(text) > 300 else ''}", markup=False, soft_wrap=True)
    told = [f"asked: {', '.join(now.asked)}"]
    told += [f"not asked: {', '.join(now.spared)}"] if now.spared else []
    told += [f"missing: {silo} ({why})" for silo, why in now.missing.items()]
    told += [f"{what} {duration(seconds)}" for what, seconds in now.seconds.items()]
    print(clean("; ".join(told)), file=sys.stderr)
