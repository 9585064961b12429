"""A method that averages, named within another method's settings: how a silo's own model, or a retriever, is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedtailor import find, tables
from fedtailor.errors import suggest
from fedtailor.methods.averaging import Averaging


def named(table: Mapping[str, Any], what: str, refused: Collection[str] = (), why: str = "") -> Averaging:
    """The method that a table (name, and settings) names. `refused`: settings that are not for here, and why not. Raises
    ValueError."""
    settings = {key: value for key, value in table.items() if key != "name"}
    known = [name for name, one in find.methods().items() if issubclass(one, Averaging)]
    if "name" not in table:
        raise ValueError(f"{what} needs a name{suggest('', known)}; a silo's table replaces all of [method.{what}]")
    name = str(table["name"])
    if name not in known and ":" not in name:
        raise ValueError(f"{what}: {name!r} is no method that trains{suggest(name, known)}")
    kind = find.method(name)
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
