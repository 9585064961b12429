"""Where rows come from: a demo set, a file, a folder saved by `datasets`, or a hub. Each becomes a `Table`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtailor import demo
from fedtailor.errors import UserError, suggest

Record = Mapping[str, Any]

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Table:
    name: str  # how messages call it
    rows: list[Record]
    columns: tuple[str, ...]
    lines: tuple[int, ...] = ()  # of the rows, where the format has lines
    folder: Path = Path()  # where the paths in it begin

    def place(self, index: int) -> str:
        """`reviews.jsonl line 17`, or `reviews.parquet row 17`, counted from 1."""
        return f"{self.name} line {self.lines[index]}" if self.lines else f"{self.name} row {index + 1}"


def read(source: str, *, config: str = "", revision: str = "", split_column: str = "split") -> Table:
    """All rows of `source`. A demo set's name comes before a file of that name (write `./name` for the file).

    A folder or hub set that has its splits apart gets them as the column `split_column`; splits of other names than
    train, validation and test are left out, unless there are no others. Class numbers become class names.
    """
    path = Path(source).expanduser()
    if source in demo.names():
        made = demo.fetch(source)  # .parquet where rows hold bytes
        return READERS[made.suffix](made, source)
    if path.is_dir():
        return _saved(path, split_column)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(
                f"[data] source {source!r}: unknown format {path.suffix!r} (choices: {', '.join(sorted(READERS))}, or "
                f"a folder written by datasets.save_to_disk); convert the file to one of them"
            )
        return replace(READERS[path.suffix.lower()](path, path.name), folder=path.parent)
    if path.suffix.lower() in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"[data] source {source!r}: there is no such file; looked for {path.absolute()}")
    if source.count("/") == 1:
        return _hub(source, config, revision, split_column)
    raise UserError(
        f"[data] source {source!r} is no demo set, file or folder{suggest(source, demo.names())}; files end in "
        f"{', '.join(sorted(READERS))}, and a hub id has the form owner/name"
    )


def _text(path: Path, name: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"[data] source {name}: cannot be read ({error.strerror}); check the file's permissions"
        ) from None
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; save the file as "
            f"UTF-8, for example with iconv -f cp1252 -t utf-8"
        ) from None


def _table(name: str, rows: list[Record], lines: tuple[int, ...] = ()) -> Table:
    if not rows:
        raise UserError(f"[data] source {name} has no rows; give it one row per example")
    return Table(name, rows, tuple(dict.fromkeys(column for row in rows for column in row)), lines)


def _jsonl(path: Path, name: str) -> Table:
    rows: list[Record] = []
    lines = []
    # Not splitlines(): U+2028 and U+0085 may stand inside a JSON string.
    for number, line in enumerate(_text(path, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # half of a pair that stands for one character: no text, and no bytes either
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{name} line {number}: half a surrogate pair (\\ud...), cut off; mend the text") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name} line {number}: not valid JSON ({error}); each line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{name} line {number}: a {type(row).__name__} where a JSON object is needed; write one "
                '{"column": value, ...} a line'
            )
        rows.append(row)
        lines.append(number)
    return _table(name, rows, tuple(lines))


def _csv(path: Path, name: str) -> Table:
    # The default of 131,072 characters a field is less than a long document.
    csv.field_size_limit(2**31 - 1)
    text = _text(path, name)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Record] = []
    lines = []
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        if "" in header or len(set(header)) < len(header):
            odd = next(name for name in header if not name or header.count(name) > 1)
            raise UserError(f"{name} line 1: {'an empty column name' if not odd else f'two columns {odd!r}'}; name each once")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{name} line {reader.line_num}: {'more' if None in row else 'fewer'} fields than the "
                    f"{len(reader.fieldnames or ())} of the header; put text with commas between double quotes"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        line = min(reader.line_num + 1, len(text.splitlines()))  # the reader counts a line once it is through
        raise UserError(f"{name} line {line}: not valid CSV ({error}); check the double quotes") from None
    return _table(name, rows, tuple(lines))


def _parquet(path: Path, name: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return _table(name, pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable parquet file ({_first_line(error)}); write it anew") from None


READERS: Mapping[str, Callable[[Path, str], Table]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _saved(path: Path, split_column: str) -> Table:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a foreign or damaged folder makes of it
        raise UserError(
            f"[data] source {str(path)!r}: not a folder written by datasets.save_to_disk ({_first_line(error)})"
        ) from None
    return _from_datasets(found, path.name, split_column)


def _hub(source: str, config: str, revision: str, split_column: str) -> Table:
    import datasets

    try:
        found = datasets.load_dataset(source, config or None, revision=revision or None)
    except Exception as error:  # the hub's client raises a dozen types
        raise UserError(
            f"[data] source {source!r}: no such file here, and not loaded from the hub ({_first_line(error)}); check "
            f"the id, config, revision and the network"
        ) from None
    return _from_datasets(found, source, split_column)


def _from_datasets(found: Any, name: str, split_column: str) -> Table:
    """`found` is a Dataset, or a mapping of split names to Datasets."""
    apart: dict[str, Any] = dict(found) if isinstance(found, dict) else {"": found}
    known = {split: part for split, part in apart.items() if split in SPLITS} or apart
    rows: list[Record] = []
    for split, part in known.items():
        for column, feature in part.features.items():
            if type(feature).__name__ == "Image":  # the file's own bytes: as equal as the files are
                part = part.cast_column(column, replace(feature, decode=False))
        classes = {column: feature for column, feature in part.features.items() if hasattr(feature, "int2str")}
        for row in part:
            named = {c: row[c] if row[c] is None or row[c] < 0 else classes[c].int2str(row[c]) for c in classes}
            own = {split_column: split} if split in SPLITS and split_column not in row else {}
            rows.append({**row, **named, **own})
    return _table(name, rows)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
