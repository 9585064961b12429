"""Things found by existing: a module of that name in a package of ours, or the user's "package.module:name"."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.errors import UserError, suggest


def names(package: str) -> list[str]:
    """Modules of a package, by name."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name[0] != "_")


def method(name: str) -> type[Any]:
    """The method class of `methods/<name>.py`, or of "package.module:Class" (then its package is allowed on the wire).

    A class of ours is the dataclass that the module itself defines and that has a `round`. Raises UserError.
    """
    package = "fedtailor.methods"
    if ":" in name:
        what = "frozen dataclass with begin, round and serve"
        return _foreign(name, "method.name", _is_method, what)  # type: ignore[no-any-return]
    known = [n for n in names(package) if _class(importlib.import_module(f"{package}.{n}")) is not None]
    if name not in known:
        raise UserError(f"method.name = {name!r}: no such method{suggest(name, known)}; or give 'package.module:Class'")
    found = _class(importlib.import_module(f"{package}.{name}"))
    assert found is not None
    return found


def methods() -> dict[str, type[Any]]:
    """All methods that ship, by name."""
    found = {n: _class(importlib.import_module(f"fedtailor.methods.{n}")) for n in names("fedtailor.methods")}
    return {n: c for n, c in found.items() if c is not None}


def function(module: str, name: str, place: str, known: set[str], what: str = "function") -> Any:
    """A public function of one of our modules, or of "package.module:name". Raises UserError. `what`: its word in errors."""
    if ":" in name:
        return _foreign(name, place, callable, what)
    if name not in known:
        raise UserError(
            f"{place} = {name!r}: no such {what}{suggest(name, known)}; or give 'package.module:{what}'"
        )
    return getattr(importlib.import_module(module), name)


def functions(module: Any) -> set[str]:
    """Public functions that a module itself defines."""
    return {
        n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__ and n[0] != "_"
    }


def _class(module: Any) -> type[Any] | None:
    mine = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    concrete = [c for c in mine if hasattr(c, "round") and not inspect.isabstract(c)]
    return concrete[0] if concrete else None


def _is_method(found: Any) -> bool:
    frozen = isinstance(found, type) and is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen and not inspect.isabstract(found) and all(hasattr(found, n) for n in ("begin", "round", "serve"))


def _foreign(name: str, place: str, fits: Callable[[Any], bool], what: str) -> Any:
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a method file beside the experiment, as `python -m` would find it
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a file of the user's does when it is run
        raise UserError(f"{place} = {name!r}: cannot be imported: {type(error).__name__}: {error}") from error
    if not fits(found):
        raise UserError(f"{place} = {name!r}: is no {what}")
    wire.allow(module)
    return found
