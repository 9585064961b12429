"""Documents into a silo's index: what changed is done anew, what did not is left, what cannot be read is told and passed over."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fedtailor import progress
from fedtailor.errors import UserError
from fedtailor.retrieval import store
from fedtailor.retrieval.cutting import cut
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.reading import digest, kinds, read

CUT, OVERLAP = 200, 40  # tokens
LARGEST = 50.0  # MB of a file
AT_ONCE = 256  # passages embedded together: of a large document a bar moves


@dataclass(frozen=True)
class Added:
    new: int
    changed: int
    same: int
    empty: tuple[str, ...]  # files without text
    failed: tuple[str, ...]  # a line each
    gone: tuple[str, ...]  # read before below the folders that were added, and there no more


def opened(path: Path, name: str, load: Callable[[str], Embedder]) -> tuple[store.Store, Callable[[], Embedder]]:
    """The index at `path`, made where there is none, and its embedder, as `embedder_of` gives it. `name`: of the embedder;
    "": the index's own, or MiniLM."""
    if not path.exists():
        embedder = load(name or "minilm")
        size = min(CUT, embedder.reads)
        made = store.make(path, embedder.name, embedder.sha256, embedder.size, (size, min(OVERLAP, size // 4)))
        return made, lambda: embedder
    found = store.load(path)
    again = embedder_of(found, name, load)
    if name not in ("", found.about("embedder")):
        again()
    return found, again


def embedder_of(index: store.Store, name: str, load: Callable[[str], Embedder]) -> Callable[[], Embedder]:
    """Loaded when it is asked for: seconds that an index where nothing changed does not need. Asking raises UserError where the
    index was made with another one."""

    @cache
    def asked() -> Embedder:
        held = index.about("embedder")
        embedder = load(name or held)
        if embedder.sha256 != index.about("embedder_sha256"):
            raise UserError(
                f"{index.path}: its vectors are by {held!r}, whose weights are not those of {embedder.name!r}; make a new index"
            )
        return embedder

    return asked


def add(
    index: store.Store, embedder: Callable[[], Embedder], paths: Sequence[Path], largest: float = LARGEST, prune: bool = False,
    tag: bool = False,
) -> Added:  # fmt: skip
    """Files, and all that can be read in folders, which are named by their path below these. `prune`: take out what was read
    below these folders and is there no more. `tag`: what is added or changed is shareable; a tag stays. Raises UserError for a
    path that is not there, or two files of one name."""
    files, failed = _files(paths)
    known, shareable, new, changed, same = index.documents(), index.shareable(), 0, 0, 0
    empty = list[str]()
    size, overlap = int(index.about("cut")), int(index.about("overlap"))
    with progress.bar("documents", len(files)) as advance:
        for name, path in files.items():
            before, source = known.get(name), str(path.resolve())
            try:
                _may(path, name, before[1] if before else source, largest)
                if before and before[0] == digest(path):
                    same += 1
                    continue
                document = read(path, name)
            except (UserError, OSError) as error:
                told = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
                failed.append(f"{told}{'; its earlier version is kept' if before else ''}")
                continue
            finally:
                advance()
            if not document.sections:
                empty.append(name)
                index.remove(name)
                continue
            passages = list(cut(document, embedder().model.tokenizer, size, overlap))
            found = vectors(embedder(), [passage.indexed for passage in passages])
            index.put(name, document.sha256, passages, found, _now(), source, tag or name in shareable)
            new, changed = new + (before is None), changed + (before is not None)
    roots = [path.resolve() for path in paths if path.is_dir()]
    was = {name: Path(source) for name, (_, source) in index.documents().items()}
    gone = [name for name, at in was.items() if not at.exists() and any(root in at.parents for root in roots)]
    for name in gone if prune else ():
        index.remove(name)
    return Added(new, changed, same, tuple(empty), tuple(failed), tuple(gone))


def _may(path: Path, name: str, before: str, largest: float) -> None:
    """Raises UserError where it is not to be read."""
    if not name.isprintable():
        raise UserError(f"{name!r}: a name that cannot be shown; rename it")
    if before != str(path.resolve()) and Path(before).exists():
        raise UserError(f"{path}: {name!r} is how {before} is cited; add the folder that holds both, or take that one out first")
    if (held := path.stat().st_size / 1e6) > largest:
        raise UserError(f"{path}: {held:.3g} MB, more than {largest:g}; split it, or raise --largest")


def vectors(embedder: Embedder, texts: Sequence[str]) -> store.Vectors:
    """(texts, size), a bar meanwhile."""
    found = [np.zeros((0, embedder.size), np.int16)]
    with progress.bar("passages", -(-len(texts) // AT_ONCE)) as advance:
        for begin in range(0, len(texts), AT_ONCE):
            found.append(embedder.passages(texts[begin : begin + AT_ONCE]))
            advance()
    return np.concatenate(found)


def _files(paths: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """name -> file, in order of names; and what could not be looked into."""
    found, failed = dict[str, Path](), list[str]()
    for name, path in (pair for given in paths for pair in _below(given, failed)):
        if found.setdefault(name, path).resolve() != path.resolve():
            raise UserError(f"{path} and {found[name]} would both be cited as {name!r}; add the folder that holds both")
    if not found and not failed:
        raise UserError(f"{', '.join(map(str, paths))}: no document there ({', '.join(kinds())})")
    return dict(sorted(found.items())), failed


def _below(given: Path, failed: list[str]) -> Iterator[tuple[str, Path]]:
    """Nothing whose name begins with a dot, and nothing through a link to a folder: it may lead anywhere, also back."""
    if not given.is_dir():
        if not given.exists():
            raise UserError(f"{given}: not there")
        yield given.name, given
        return

    def closed(error: OSError) -> None:
        failed.append(f"{error.filename}: {error.strerror}")

    for at, folders, names in os.walk(given, onerror=closed):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        failed.extend(f"{Path(at, one)}: a link to a folder; add that one" for one in folders if Path(at, one).is_symlink())
        for path in (Path(at, one) for one in sorted(names) if not one.startswith(".")):
            if path.suffix.lower() in kinds():
                yield path.relative_to(given).as_posix(), path


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
