"""What the kits of every engine share: which names are allowed, what a kit says of itself, where its sockets lie."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtailor.errors import UserError, suggest

ENGINES = ("nvflare", "flower")  # each a module beside this one, and NAME_kit with its `init`
RESERVED = ("admin", "authority", "server")  # folders of ours, and the name by which a silo knows its server
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
HOST = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
PLAIN = "letters, digits, - and _ only, 50 at most, a letter or digit first"
ABOUT = "fedtailor.json"
WORKER = "worker"  # in a silo's local/: where the worker's socket is, if not at its usual place in the kit
SOCKET = "courier.sock"  # in the server's kit: the server program listens there for the engine's server end
SITE = """
# allow = ["ours"]                    # packages besides fedtailor whose methods may run here
[data]                                # laid over the experiment's [data], seen by nobody else
# source = "rows.jsonl"               # or: fedtailor silo KIT --data rows.jsonl. No server can choose this file
# template = "{note}\\nUrgency:"      # where the columns are called otherwise
"""


def engine(kit: Path, kind: str) -> Any:
    """The module of a kit's engine: `needed`, `courier`, `serve_server`, `serve_client`. Raises UserError as `about` does."""
    return importlib.import_module(f"fedtailor.engines.{_known(about(kit, kind).get('engine', ENGINES[0]))}")


def maker(engine: str) -> Any:
    """The `init` that makes kits of this engine. Raises UserError where there is no such engine."""
    return importlib.import_module(f"fedtailor.engines.{_known(engine)}_kit").init


def _known(engine: str) -> str:
    if engine not in ENGINES:
        raise UserError(f"engine = {engine!r}: no such engine{suggest(engine, ENGINES)}")
    return engine


def about(kit: Path, kind: str) -> dict[str, Any]:
    """What a kit says of itself. Raises UserError where it is no kit of this kind ("server" or "silo")."""
    try:
        found: dict[str, Any] = json.loads((kit / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{kit}: no kit of a federation ({ABOUT}: {error}); `fedtailor federation init` makes them") from None
    if (kind == "server") != ("silos" in found):
        raise UserError(f"{kit}: not the kit of a {kind}; choose the {kind}'s own folder")
    return found


def worker_socket(kit: Path) -> Path:
    """Where a silo's worker listens. Said on the silo's side alone: local/worker in its kit, one path."""
    file = kit / "local" / WORKER
    said = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    return kit / (said or "silo/worker.sock")


def checked(folder: Path, name: str, server: str, silos: Sequence[str], days: int) -> tuple[str, int]:
    """Host and port of a new federation. Raises UserError that tells all that is wrong with it."""
    host, _, port = server.rpartition(":")
    errors = []
    if not HOST.fullmatch(host) or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        errors.append(f"server = {server!r}: must be HOST:PORT as the silos reach it, for instance fl.example.org:8002")
    if not silos:
        errors.append("no silo is named; name one at least")
    errors += [f"name = {name!r}: {PLAIN}"] if not NAME.fullmatch(name) else []
    errors += bad_names(silos, host)
    if days < 1:
        errors.append(f"days = {days}: certificates must be valid for a day at least")
    if folder.exists() and any(folder.iterdir()):
        errors.append(f"{folder}: not empty; choose a new folder, or remove the old federation first")
    if errors:
        raise UserError("\n".join(errors))
    return host, int(port)


def bad_names(silos: Sequence[str], host: str, taken: Collection[str] = ()) -> list[str]:
    """One line for each name that no new silo may have."""
    low = [silo.lower() for silo in silos]
    errors = [f"silo = {silo!r}: {PLAIN}" for silo in silos if not NAME.fullmatch(silo)]
    errors += [f"silo = {silo!r}: reserved; choose another name" for silo in silos if silo.lower() in (*RESERVED, host.lower())]
    errors += [f"silo = {one!r}: named more than once; names differ by more than case" for one in {*low} if low.count(one) > 1]
    known = {one.lower() for one in taken}
    again = [silo for silo in silos if silo.lower() in known]
    return errors + [f"silo = {silo!r}: is in this federation already; choose another name" for silo in again]


def owners_alone(kit: Path) -> None:
    for path in [kit, *kit.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


def write(file: Path, table: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(table, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Whole or not at all, for its owner alone."""
    new = file.with_name(file.name + ".new")
    new.touch(0o600)
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
