"""Settings that name files: lists of a value a line, read once, when the experiment is; rows, models, secrets, by whole path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtailor.errors import UserError


def inlined(settings: dict[str, Any], names: Sequence[str], folder: Path) -> None:
    """In place of a file's name (.jsonl: JSON; any other: text, with \\n for a line's end) what its lines hold, so that a
    run is whole without the file. Relative to here or to `folder`. Raises UserError with the line."""
    for name in names:
        given = settings.get(name)
        if isinstance(given, str):
            path = next((p for p in (Path(given).expanduser(), folder / given) if p.is_file()), None)
            if path is None:
                raise UserError(f"[method] {name} = {given!r}: no such file; write a list, or a file with a value a line")
            settings[name] = _lines(path, name)


def found(table: dict[str, Any], folder: Path) -> None:
    """A data file or model folder, relative to here or to the experiment's own folder, by its whole path: a resume
    finds it from anywhere."""
    from fedtailor import demo, packaged

    models, none, rows = [*packaged.PACKAGED, "tiny"], list[str](), demo.names()
    named_so = (("data", "source", rows), ("data", "public", rows), ("model", "name", models), ("method", "secrets", none))
    for part, key, names in named_so:
        settings = table.get(part)
        named = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(settings, dict) and isinstance(named, str) and named and named not in names:
            there = next((p for p in (Path(named).expanduser(), folder / named) if p.exists()), None)
            if there is not None:
                settings[key] = str(there.resolve())


def _lines(path: Path, name: str) -> list[Any]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"[method] {name}: {path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value: Any = json.loads(line) if path.suffix == ".jsonl" else line.replace("\\n", "\n")
            except ValueError as error:
                raise UserError(f"[method] {name}: {path}, line {number}: not JSON ({error})") from error
            if isinstance(value, dict) and value.keys() == {"input", "answer"}:
                value = [value["input"], value["answer"]]
            found.append(value)
    if not found:
        raise UserError(f"[method] {name}: {path} is empty; write a value a line")
    return found
