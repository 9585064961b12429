"""Bodies <-> bytes: one safetensors file, its tensors named by their place, its JSON in one metadata entry.

    pack(Train(tensors={"a": torch.ones(2)}, steps=3))
      tensor "tensors/a", metadata {"fedtailor": '{"version": 1, "body": {"$type": "...:Train", "steps": 3, ...}}'}

Nothing is pickled and nothing is imported that is not allowed: a body names its class, and `unpack` takes it only when
it is a frozen dataclass of an allowed top-level package. Floats, NaN included, and tensors come back bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file as save_tensors_file
from torch import Tensor

from fedtailor.errors import FedtailorError
from fedtailor.packed import LARGE, Packed, Spooled

VERSION = 1
ALLOWED = frozenset({"fedtailor"})  # top-level packages whose bodies and in_silo functions this process accepts
_DTYPES = frozenset(_TYPES.values())  # all that the format holds
_KEY = "fedtailor"  # one metadata entry only: the order of several is not fixed, and equal bodies must pack equally


class WireError(FedtailorError):
    """Bytes or a body that cannot cross: not a frozen dataclass, not packable, damaged, not allowed, other version."""


@dataclass(frozen=True)
class Failure:
    """The reply of a silo that could not do its work. `error` is one line without rows of the silo's."""

    error: str


def allow(package: str) -> None:
    """Accept bodies and `in_silo` functions of one more top-level package, for example a method file of the user's."""
    global ALLOWED
    ALLOWED = ALLOWED | {package.partition(".")[0]}


def pack(body: Any) -> bytes:
    """A frozen dataclass as bytes. Equal bodies give equal bytes. Raises WireError naming the place that cannot cross."""
    tensors, metadata = _laid_out(body)
    return save_tensors(tensors, metadata=metadata)


def spooled(body: Any, folder: Path | None) -> Packed:
    """As `pack`; a large body goes to a file without a name in `folder`, and is never in memory twice."""
    if folder is None or not large(body):
        return pack(body)
    tensors, metadata = _laid_out(body)
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder, prefix=".body-")
    os.close(handle)
    try:
        with disk_told(folder):
            save_tensors_file(tensors, path, metadata=metadata)
        return Spooled(open(path, "rb", buffering=0))
    finally:
        os.unlink(path)


def large(body: Any) -> bool:
    return sum(tensor.nbytes for tensor in tensors_of(body).values()) >= LARGE


def unpack(data: Packed) -> Any:
    """The body again; tensors of one in a file are read as they are used. Raises WireError for damaged bytes, another
    version, or a class that is not allowed."""
    try:
        if isinstance(data, Spooled):
            with safe_open(data.path, framework="pt") as file:
                message = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        else:
            # layout: 8 bytes little-endian header length, then the JSON header, then the tensors
            length = int.from_bytes(data[:8], "little")
            message = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
            tensors = load_tensors(data)
        if message.get("version") == VERSION:
            return _decode(message["body"], tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"{len(data)} bytes that are no body of ours: {error}") from error
    raise WireError(f"wire version {message.get('version')}, this side speaks {VERSION}: install the same fedtailor")


def tensors_of(body: Any) -> dict[str, Tensor]:
    """Every tensor of a body under the name it has on the wire."""
    tensors: dict[str, Tensor] = {}
    _encode(body, "", tensors)
    return tensors


def summed(body: Any, weight: float, onto: Any = None) -> Any:
    """`onto + weight * body`, field by field: tensors in fp32, numbers as floats; other fields must be equal.

    `weight` itself is not multiplied by itself. With `onto=None` the sum starts here.
    """
    values = {}
    for item in fields(body):
        new = getattr(body, item.name)
        old = None if onto is None else getattr(onto, item.name)
        values[item.name] = _plus(new, 1.0 if item.name == "weight" else weight, old, item.name)
    return type(body)(**values)


def address(function: Any) -> str:
    """`module:name` of a module-level function or class."""
    return f"{function.__module__}:{function.__qualname__}"


def find(name: str) -> Any:
    """What `address` named, of an allowed package only. Raises WireError."""
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] not in ALLOWED or not attribute or "." in attribute:
        raise WireError(f"{name!r} is not allowed here (allowed packages: {', '.join(sorted(ALLOWED))})")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise WireError(f"{name!r} is not installed here: {error}") from error


def find_work(name: str) -> Any:
    """The `in_silo` function of that name. Anything else is refused."""
    work = find(name)
    if not getattr(work, "__in_silo__", False):
        raise WireError(f"{name!r} is not an in_silo function: a silo refuses it")
    return work


def write_file(path: Path, body: Any) -> int:
    """Pack to a file so that it is there whole or not at all, and on the disk. Returns the bytes written."""
    tensors, metadata = _laid_out(body)
    with _placed(path) as beside, disk_told(beside):
        save_tensors_file(tensors, beside, metadata=metadata)
    return path.stat().st_size


def write_bytes(path: Path, data: Packed) -> None:
    """Write beside, flush to the disk, then rename over: a kill or a full disk leaves the old file as it was."""
    with _placed(path) as beside:
        if isinstance(data, Spooled):
            data.copy(beside)
        else:
            beside.write_bytes(data)


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """What is written to the file that this gives is at `path` afterwards, on the disk, or nothing is."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        _synced(beside)
        beside.replace(path)
        _synced(path.parent)  # the new name, too, must be on the disk: a power cut may follow
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_told(path: Path) -> Iterator[None]:
    """Libraries written in Rust tell a full disk, or whatever the system refused, in their own words: say it in its own."""
    try:
        yield
    except Exception as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def read_file(path: Path) -> Any:
    """Raises WireError naming the file."""
    try:
        large_one = path.stat().st_size >= LARGE
        return unpack(Spooled(path.open("rb", buffering=0)) if large_one else path.read_bytes())
    except WireError as error:
        raise WireError(f"{path}: {error}") from error


def _laid_out(body: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the file that a body is, and its metadata."""
    tensors: dict[str, Tensor] = {}
    skeleton = _encode(body, "", tensors)
    text = json.dumps({"version": VERSION, "body": skeleton}, separators=(",", ":"), allow_nan=False)
    return tensors, {_KEY: text}


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    here = place.removeprefix("/") or "body"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            raise WireError(f"{here}: a tensor of {value.dtype}, {value.layout} cannot cross")
        name = place.removeprefix("/") or "tensor"
        while name in tensors:  # "a/b" may be one key, or two
            name += "'"
        tensor = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # safetensors refuses two names on one memory; a tied weight is sent once a name
        if not tensor.numel() or any(_overlap(tensor, other) for other in tensors.values()):
            tensor = tensor.clone()
        tensors[name] = tensor
        return {"$tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        if not type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise WireError(f"{here}: {type(value).__name__} must be a frozen dataclass to cross the wire")
        inside = {f.name: _encode(getattr(value, f.name), f"{place}/{f.name}", tensors) for f in fields(value)}
        return {"$type": address(type(value)), **inside}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise WireError(f"{here}: key {key!r} must be a text that does not begin with $")
        return {key: _encode(item, f"{place}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
    raise WireError(f"{here}: a {type(value).__name__} cannot cross; use tensors, numbers, texts, lists, dicts")


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        if value["$tensor"] not in tensors:
            raise WireError(f"tensor {value['$tensor']!r} is announced but not there")
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    inside = {key: _decode(item, tensors) for key, item in value.items() if key != "$type"}
    if "$type" not in value:
        return inside
    found = find(value["$type"])
    if not (isinstance(found, type) and is_dataclass(found) and found.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise WireError(f"{value['$type']} is not a frozen dataclass")
    try:
        return found(**inside)
    except (TypeError, ValueError) as error:
        raise WireError(f"{value['$type']}: {error}") from error


def _plus(new: Any, weight: float, old: Any, place: str) -> Any:
    if isinstance(new, Tensor):
        return new.float() * weight if old is None else old.add_(new.float(), alpha=weight)
    if isinstance(new, Mapping):
        if old is not None and set(new) != set(old):
            raise WireError(f"{place}: silos sent different names")
        return {
            key: _plus(item, weight, None if old is None else old[key], f"{place}/{key}") for key, item in new.items()
        }
    if isinstance(new, bool) or not isinstance(new, int | float):
        if old is not None and old != new:
            raise WireError(f"{place}: {new!r} cannot be added")
        return new
    return new * weight + (0.0 if old is None else old)


def not_finite(body: Any) -> str | None:
    """The first tensor of a body with a NaN or an infinity, or None."""
    return next((name for name, value in _floating(body) if not _finite(value)), None)


def _finite(value: Tensor) -> bool:
    """Piece by piece: of a large tensor, what is computed on the way would be as large again."""
    return all(bool(torch.isfinite(piece).all()) for piece in value.flatten().split(1 << 18))


def _floating(body: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in tensors_of(body).items() if value.is_floating_point())


def leaving(body: Any) -> Collection[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor a body would put on the wire: what `fedtailor check` prints."""
    return [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors_of(body).items()]
