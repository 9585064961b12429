"""Documents into a silo's index: what changed is done anew, what did not is left, what cannot be read is told and passed over."""

from __future__ import annotations

import datetime
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


def opened(path: Path, name: str, load: Callable[[str], Embedder]) -> tuple[store.Store, Callable[[], Embedder]]:
    """The index at `path`, made where there is none, and its embedder, which is loaded when it is asked for: seconds that an
    index where nothing changed does not need. `name`: of the embedder; "": the index's own, or MiniLM. Asking raises UserError
    where the index was made with another one."""
    if not path.exists():
        embedder = load(name or "minilm")
        size = min(CUT, embedder.reads)
        made = store.make(path, embedder.name, embedder.sha256, embedder.size, (size, min(OVERLAP, size // 4)))
        return made, lambda: embedder
    found = store.load(path)

    @cache
    def again() -> Embedder:
        embedder, held = load(name or found.about("embedder")), found.about("embedder")
        if embedder.sha256 != found.about("embedder_sha256"):
            raise UserError(
                f"{path}: its vectors are by {held!r}, whose weights are not those of {embedder.name!r}; make a new index"
            )
        return embedder

    if name not in ("", found.about("embedder")):
        again()
    return found, again


def add(index: store.Store, embedder: Callable[[], Embedder], paths: Sequence[Path], largest: float = LARGEST) -> Added:
    """Files, and all that can be read in folders, which are named by their path below these. Raises UserError for a path that is
    not there, or two files of one name."""
    files = _files(paths)
    known, new, changed, same = index.documents(), 0, 0, 0
    empty, failed = list[str](), list[str]()
    size, overlap = int(index.about("cut")), int(index.about("overlap"))
    with progress.bar("documents", len(files)) as advance:
        for name, path in files.items():
            try:
                if (held := path.stat().st_size / 1e6) > largest:
                    raise UserError(f"{path}: {held:.3g} MB, more than {largest:g}; split it, or raise --largest")
                if known.get(name) == digest(path):
                    same += 1
                    continue
                document = read(path, name)
            except (UserError, OSError) as error:
                failed.append(str(error))
                continue
            finally:
                advance()
            passages = document.sections and list(cut(document, embedder().model.tokenizer, size, overlap))
            if not passages:
                empty.append(name)
                index.remove(name)
                continue
            index.put(name, document.sha256, passages, _vectors(embedder(), [p.indexed for p in passages]), _now())
            new, changed = new + (name not in known), changed + (name in known)
    return Added(new, changed, same, tuple(empty), tuple(failed))


def _vectors(embedder: Embedder, texts: Sequence[str]) -> store.Vectors:
    found = []
    with progress.bar("passages", -(-len(texts) // AT_ONCE)) as advance:
        for begin in range(0, len(texts), AT_ONCE):
            found.append(embedder.passages(texts[begin : begin + AT_ONCE]))
            advance()
    return np.concatenate(found)


def _files(paths: Sequence[Path]) -> dict[str, Path]:
    """name -> file, in order of names."""
    found = dict[str, Path]()
    for name, path in (pair for given in paths for pair in _below(given)):
        if found.setdefault(name, path).resolve() != path.resolve():
            raise UserError(f"{path} and {found[name]} would both be cited as {name!r}; add the folder that holds both")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no document there ({', '.join(kinds())})")
    return dict(sorted(found.items()))


def _below(given: Path) -> Iterator[tuple[str, Path]]:
    if given.is_dir():
        for path in sorted(given.rglob("*")):
            below = path.relative_to(given)
            if path.suffix.lower() in kinds() and path.is_file() and not any(part.startswith(".") for part in below.parts):
                yield below.as_posix(), path
    elif given.exists():
        yield given.name, given
    else:
        raise UserError(f"{given}: not there")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
