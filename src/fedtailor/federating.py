"""`fedtailor federation ...`: who takes part, after `federation init` made the first kits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Federations between machines.")

Kits = Annotated[Path, typer.Argument(help="the folder that `fedtailor federation init` made")]
Name = Annotated[str, typer.Option("--silo", help="its name")]


@app.command()
def add(
    kits: Kits,
    silo: Name,
    days: Annotated[int | None, typer.Option(help="its certificate's; by default as long as the federation's")] = None,
) -> None:
    """Make the kit of a silo that joins later. All other kits stay as they are."""
    from fedtailor.engines import nvflare_members

    kit = nvflare_members.add(kits, silo, days)
    typer.echo(f"{silo}: {kit}  (there: fedtailor silo {kit} --data ROWS.jsonl)")
    typer.echo(f"A running server lets {silo} in as it is. Runs that begin or are resumed from now on ask it.")


@app.command()
def remove(kits: Kits, silo: Name) -> None:
    """Keep a silo out from now on, whatever kit it holds. Its name is not used again."""
    from fedtailor.engines import nvflare_members

    nvflare_members.remove(kits, silo)
    typer.echo(f"Runs that begin or are resumed from now on leave {silo} out.")
    typer.echo(f"next: stop the server and start it anew, which cuts {silo} off: fedtailor server {kits / 'server'}")


@app.command()
def renew(
    kits: Kits, days: Annotated[int, typer.Option(help="how long the new certificates are valid")] = 365
) -> None:
    """Make new certificates for all before the old ones end. Until then, old and new go together."""
    from fedtailor.engines import nvflare_members

    for who, files in nvflare_members.renew(kits, days).items():
        typer.echo(f"{who}: {', '.join(str(file) for file in files)}")
    typer.echo("next: send each silo its two files (nothing in them is secret); they replace those in its kit's startup/")
    typer.echo("then start `fedtailor server` anew, and each `fedtailor silo`, before the old ones end")
