"""A dataclass from a table of an experiment file: its fields are the schema. All errors are told together, one line each."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedtailor.errors import UserError, suggest


def part(kind: type[Any], values: Any, where: str, errors: list[str]) -> Any:
    """`kind` of these values. Errors are appended; None if there were any."""
    if not isinstance(values, Mapping):
        errors.append(f"{where} must be a table, not {values!r}")
        return None
    hints, known, before = get_type_hints(kind), {f.name for f in fields(kind)}, len(errors)
    moved = getattr(kind, "ELSEWHERE", {})
    for key in [k for k, given in values.items() if k not in known and not (k in moved and given == [])]:  # as older runs have it
        elsewhere = moved.get(key)
        errors.append(f"{where} has no setting {key!r}{f'; {elsewhere}' if elsewhere else suggest(key, known)}")
    taken = {k: v for k, v in values.items() if k in known}
    flawed = {name for name, given in taken.items() if _flawed(hints[name], given, f"{where} {name}", errors)}
    try:
        made = _adapter(kind).validate_python(taken)  # type: ignore[arg-type]
    except ValidationError as error:
        for one in error.errors():
            place = ".".join(
                str(p) for p in one["loc"] if not re.match(r"(function|constrained|tagged|literal)", str(p))
            )
            told = one["msg"].removeprefix("Value error, ")
            given = "" if one["type"] in ("missing", "value_error") else f", not {one['input']!r}"
            if not flawed & {str(p) for p in one["loc"][:1]}:
                errors.append(f"{where} {place}: {told}{given}".replace(": : ", ": ").replace(" : ", ": "))
        return None
    return made if len(errors) == before else None


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes longer to be made than all that it then checks


def _flawed(hint: Any, given: Any, where: str, errors: list[str]) -> bool:
    """What pydantic would take, leave out or tell in words of its own: TOML tells true from 1, and so do we; a setting that a
    table within a table lacks; a name where a table is needed."""
    kinds, before = (hint, *get_args(hint)), len(errors)
    told = given if isinstance(given, list) else [given]
    if any(isinstance(v, bool) for v in told) and not {bool, Any} & set(kinds):
        errors.append(f"{where}: must not be true or false, not {given!r}")
    if hint is bool and not isinstance(given, bool):
        errors.append(f"{where}: must be true or false, not {given!r}")
    inner = next((k for k in kinds if is_dataclass(k)), None)
    if inner is not None and isinstance(given, Mapping):
        part(inner, given, where, errors)  # type: ignore[arg-type]
    elif isinstance(given, str) and (inner is not None or get_origin(hint) is Mapping):
        named = any(f.name == "name" for f in fields(inner)) if inner is not None else hint == Mapping[str, Any]
        errors.append(f"{where} must be a table{f', as {{name = {json.dumps(given)}}}' if named else ''}, not {given!r}")
    return len(errors) > before


def put(table: dict[str, Any], path: str, value: Any, told: str = "") -> None:
    """The value laid over the setting at a dotted path."""
    *parts, key = path.split(".")
    for part in parts:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"{told or path}: {part} is a value, not a table")
    table[key] = value
