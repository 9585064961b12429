"""Files of a run's folder: JSON that is there whole or not at all, names made of a silo's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.errors import UserError


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether this process has that lock file for itself meanwhile."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def as_folder(name: str) -> str:
    """The name, where it can be a folder's. Raises ValueError."""
    if not re.fullmatch(r"[^./\\][^/\\]*", name):
        raise ValueError(f"name {name!r} cannot be a folder's: no slashes, and no dot in front")
    return name


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and what it held is done again") from error


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wire.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def file_name(silo: str) -> str:
    """A silo's name as a file name: readable, and different for different names."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in silo)[:60]
    return safe if safe == silo else f"{safe}-{hashlib.sha256(silo.encode()).hexdigest()[:8]}"


def placeless(text: str) -> str:
    """The text of an experiment.toml without the folders that its data and model lie in: a page is passed on."""
    absolute = r'^(source|name|secrets) = "(?:/|[A-Za-z]:)[^"\n]*[/\\]([^"/\\\n]+)"$'
    return re.sub(absolute, r'\1 = "\2"', text, flags=re.MULTILINE)
