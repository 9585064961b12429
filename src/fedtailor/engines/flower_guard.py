"""Runs one of Flower's commands; those that run an app are guarded: python -m fedtailor.engines.flower_guard KIT NAME ...

Flower loads code from every app that is submitted, on the server and at each silo. Here no file of an app is read but its
description, and that must be ours: our two ends, which are installed. So it is each participant's own rule that no code
comes in, whatever the server does. The interpreter itself calls the guard, before each file is opened or library loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor.engines.flower_kit import APP, APPS


def guard(apps: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: raises PermissionError before anything in the folder `apps` is read that is no description of ours.

    Flower unpacks an app there, which only writes.
    """
    inside = os.path.realpath(apps) + os.sep

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = given
            writes = any(sign in mode for sign in "wxa") if isinstance(mode, str) else flags & os.O_ACCMODE == os.O_WRONLY
        elif event in ("import", "ctypes.dlopen"):
            path, writes = given[1 if event == "import" else 0], False
        else:
            return
        if writes or not isinstance(path, str | bytes | os.PathLike):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith(inside) or real in checked:
            return
        if os.path.basename(real) == "pyproject.toml":
            checked.add(real)  # this very reading comes here, too
            if _is_ours(Path(real)):
                return
            checked.discard(real)
        raise PermissionError(f"{real}: an app that is not fedtailor's: nothing of it is run here")

    checked: set[str] = set()
    return hook


def _is_ours(file: Path) -> bool:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")) == APP
    except (OSError, ValueError):
        return False


def main() -> None:
    kit, name = sys.argv[1:3]
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    if name in APPS:
        sys.addaudithook(guard(Path(kit) / "flower" / "apps"))
    sys.argv[:3] = [name]
    sys.exit(found.load()())


if __name__ == "__main__":
    main()
