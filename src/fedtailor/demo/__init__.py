"""Data sets to try things on, built on this machine from public packages. One module each, found by its name.

A module has `DESCRIPTION` and `LICENCE`, one line each, and `build()`, which returns the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from fedtailor import fetch as archives
from fedtailor import progress
from fedtailor.errors import UserError, suggest


class Demo(Protocol):
    DESCRIPTION: str
    LICENCE: str

    def build(self) -> list[dict[str, Any]]: ...


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Demo:
    if name not in names():
        raise UserError(f"demo set {name!r} is unknown{suggest(name, names())}")
    return cast(Demo, import_module(f"{__name__}.{name}"))


def fetch(name: str, again: bool = False) -> Path:
    """The file of a demo set: NAME-HASH.jsonl (.parquet where rows hold bytes) under `data` in the cache, HASH being the
    start of its SHA-256. Built by the first call; later calls check it, and need no network.

    `again` builds it anew, for sets whose source moves on: Debian's. A damaged file is built anew too.
    """
    demo = find(name)
    folder = archives.cache_dir() / "data"
    record = folder / f"{name}.sha256"
    if not again and (kept := _kept(folder, record)):
        return kept
    progress.line(f"getting the demo set {name}, once ...")
    rows = demo.build()
    folder.mkdir(exist_ok=True)
    with archives.workspace() as work:
        made = _write(rows, work / name)
        sha = archives.sha256(made)
        path = folder / f"{name}-{sha[:12]}{made.suffix}"
        os.replace(made, path)
        # The format of `sha256sum -c`; written last, so a half-built set is never taken for one.
        (work / record.name).write_text(f"{sha}  {path.name}\n")
        os.replace(work / record.name, record)
    return path


def split_of(key: str) -> str:
    """train, valid or test, 8 : 1 : 1, by a hash of the document a row is from: nothing of one leaks into another."""
    return {0: "test", 1: "valid"}.get(int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10, "train")


def _kept(folder: Path, record: Path) -> Path | None:
    try:
        sha, name = record.read_text().split()
        return folder / name if archives.sha256(folder / name) == sha else None
    except (OSError, ValueError):
        return None


def _write(rows: Sequence[Mapping[str, Any]], stem: Path) -> Path:
    if any(isinstance(value, bytes) for value in rows[0].values()):
        import pyarrow
        import pyarrow.parquet

        path = stem.with_suffix(".parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path
    path = stem.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path
