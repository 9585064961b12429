"""`fedtailor index ...`: documents into a silo's index, and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtailor.retrieval.store import Store

app = typer.Typer(no_args_is_help=True, help="A silo's documents, to be searched where they are.")

Index = Annotated[Path, typer.Argument(help="the index, a file")]


@app.command()
def add(
    index: Index,
    documents: Annotated[list[Path], typer.Argument(help="files, and folders of them: text, Markdown, HTML, PDF")],
    embedder: Annotated[str, typer.Option(help="of a new index: a packaged encoder, a folder or a hub id; default minilm")] = "",
    largest: Annotated[float, typer.Option(help="MB of a file, above which it is left out")] = 50.0,
    prune: Annotated[bool, typer.Option("--prune", help="take out what is no more in the folders")] = False,
    shareable: Annotated[
        bool, typer.Option("--shareable", help="tag what is added: it may leave a silo that shares such alone")
    ] = False,
) -> None:
    """Add documents, and do those anew that changed. Each is cited by its path below the folder that was added."""
    from fedtailor.errors import printable
    from fedtailor.retrieval import embedding, indexing

    opened, model = indexing.opened(index, embedder, embedding.load)
    with opened:
        try:
            done = indexing.add(opened, model, documents, largest, prune, shareable)
        except KeyboardInterrupt:
            typer.echo(f"stopped: {index} holds what is done; the same command goes on from there", err=True)
            raise
        for line in done.failed:
            typer.echo(f"left out: {printable(line)}", err=True)
        for name in done.empty:
            typer.echo(f"left out: {name}: no text in it", err=True)
        for name in done.gone:
            typer.echo(f"{'taken out' if prune else 'still in the index'}: {name}: its file is gone", err=True)
        held = opened.status()
    what = f"{done.new} new, {done.changed} changed, {done.same} as they were"
    typer.echo(f"{index}: {what}; holds {_counted(held.documents, held.passages)}")
    if done.failed:
        raise typer.Exit(2)


@app.command()
def remove(index: Index, names: Annotated[list[str], typer.Argument(help="documents, as --names lists them")]) -> None:
    """Take documents out."""
    from fedtailor.retrieval import store

    with store.load(index) as opened:
        _known(opened, names)
        for name in names:
            opened.remove(name)
        held = opened.status()
    typer.echo(f"{index}: {len(names)} taken out; holds {_counted(held.documents, held.passages)}")


@app.command()
def share(
    index: Index,
    names: Annotated[list[str], typer.Argument(help="documents, as --names lists them")],
    no: Annotated[bool, typer.Option("--no", help="take the tag away")] = False,
) -> None:
    """Tag documents as shareable: of a silo whose policy is `shareable` these alone are searched, and leave it."""
    from fedtailor.retrieval import store

    with store.load(index) as opened:
        _known(opened, names)
        opened.share(names, not no)
        typer.echo(f"{index}: {len(opened.shareable())} of {opened.status().documents} documents are shareable")


@app.command()
def status(index: Index, names: Annotated[bool, typer.Option("--names", help="list the documents")] = False) -> None:
    """Tell what an index holds."""
    from fedtailor.figures import size
    from fedtailor.retrieval import store

    with store.load(index) as opened:
        held = opened.status()
        typer.echo(f"{index}: {_counted(held.documents, held.passages)}, {held.words:,} words, {size(held.bytes)}")
        typer.echo(f"vectors: {held.size} numbers each, by {held.embedder} ({opened.about('embedder_sha256')[:12]})")
        tagged = opened.shareable()
        for name in opened.documents() if names else ():
            typer.echo(f"{name}{'  (shareable)' if name in tagged else ''}")


@app.command()
def search(
    index: Index,
    question: Annotated[str, typer.Argument(help="in plain words")],
    most: Annotated[int, typer.Option(min=1, help="passages")] = 5,
) -> None:
    """Show the passages that answer best, with their source and their score (1: as good as can be)."""
    from fedtailor.errors import UserError
    from fedtailor.retrieval import embedding, indexing, scoring, store
    from fedtailor.retrieval.terms import terms

    if not question.strip() or not question.isprintable():
        raise UserError("a question is a line of words; write it in quotes")
    with store.load(index) as opened:
        vector = indexing.embedder_of(opened, "", embedding.load)().questions([question])[0]
        with opened.snapshot():
            asked = scoring.question(question, vector, scoring.statistics(opened, list(terms(question))))
            found = scoring.united([scoring.searched(opened, asked, max(50, most))], max(50, most))[:most]
            passages = [opened.passage(one.at) for one in found]
    for one, (_, document, passage) in zip(found, passages, strict=True):
        typer.echo(f"[{document}#{passage.section}] {one.score:.3f}")
        typer.echo(f"  {' '.join(passage.text.split())}\n")
    if not found:
        typer.echo("no passage found")


def _known(opened: Store, names: Sequence[str]) -> None:
    from fedtailor.errors import UserError, suggest

    known = opened.documents()
    if gone := [name for name in names if name not in known]:
        raise UserError(f"{opened.path}: holds no document {gone[0]!r}{suggest(gone[0], known)}; nothing was changed")


def _counted(documents: int, passages: int) -> str:
    return f"{documents:,} documents in {passages:,} passages"
