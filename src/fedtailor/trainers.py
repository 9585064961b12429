"""A method that averages, named within another method's settings: how a silo's own model, or a retriever, is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedtailor import find, tables, wire
from fedtailor.errors import UserError, suggest
from fedtailor.methods.averaging import Averaging


def named(table: Mapping[str, Any], what: str, refused: Collection[str] = (), why: str = "") -> Averaging:
    """The method that a table (name, and settings) names. `refused`: settings that are not for here, and why not. Raises
    ValueError; also for a package that is not allowed here: the table may be what a server sent, and no server chooses what a
    silo imports."""
    settings = {key: value for key, value in table.items() if key != "name"}
    known = [name for name, one in find.methods().items() if issubclass(one, Averaging)]
    if "name" not in table:
        raise ValueError(f"{what} needs a name{suggest('', known)}; a silo's table replaces all of [method.{what}]")
    name = str(table["name"])
    if name not in known and ":" not in name:
        raise ValueError(f"{what}: {name!r} is no method that trains{suggest(name, known)}")
    if ":" in name and name.partition(":")[0].partition(".")[0] not in wire.ALLOWED:
        raise ValueError(f"{what}: the package of {name!r} is not allowed here; set allow in silo.toml, or call wire.allow")
    try:
        kind = find.method(name)
    except UserError as error:
        raise ValueError(f"{what}: {str(error).removeprefix('method.name = ')}") from error
    if not issubclass(kind, Averaging):
        raise ValueError(f"{what}: {name!r} is no method that trains{suggest(name, known)}")
    for key in settings:
        if key in refused:
            raise ValueError(f"{what} {key}: {why}; leave it out")
    errors = list[str]()
    made = tables.part(kind, settings, what, errors)
    if errors:
        raise ValueError(errors[0])
    return made  # type: ignore[no-any-return]


def allow(table: Mapping[str, Any]) -> None:
    """What an experiment's own file names in tables within these is allowed in this process."""
    for key, inner in table.items():
        if isinstance(inner, Mapping) and key in ("trainer", "student") and ":" in str(inner.get("name", "")):
            wire.allow(str(inner["name"]).partition(":")[0])
        elif isinstance(inner, Mapping):
            allow(inner)
