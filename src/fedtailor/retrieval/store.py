"""A silo's index on disk: one SQLite file. A document goes in, or out, in one transaction: after a kill it is whole or not there.

Vectors are whole numbers of 16 bits, so a score is an exact sum, the same whatever else is in the index: silos searched apart
give what one index over all of them would, ties included. DESIGN.md says what else was measured.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.errors import RunError, UserError
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.terms import terms

Vectors = npt.NDArray[np.int16]
SCALE = 32767  # of a component of a unit vector: the rounding is 1.5e-5
FORMAT = 1
OURS = 0x66746978  # "ftix", in the file's head
TABLES = """
create table about (key text primary key, value text not null) without rowid;
create table documents (
    id integer primary key autoincrement, name text not null unique, source text not null, sha256 text not null,
    added text not null);
create table passages (
    id integer primary key autoincrement, document integer not null references documents, number integer not null,
    section text not null, text text not null, words integer not null, vector blob not null);
create index passages_of on passages (document, number);
create table postings (term integer, passage integer, count integer not null, primary key (term, passage)) without rowid;
"""


@dataclass(frozen=True)
class Status:
    documents: int
    passages: int
    words: int
    embedder: str  # its name
    size: int  # of a vector
    bytes: int


class Store:
    """An index file, open. Use as a context manager."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self.db = path, db

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self.db.close()

    def about(self, key: str) -> str:
        row = self.db.execute("select value from about where key = ?", (key,)).fetchone()
        return row[0] if row else ""

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within is of one state, whatever another process does meanwhile."""
        self.db.execute("begin")
        try:
            yield
        finally:
            self.db.execute("rollback")

    def put(self, name: str, sha256: str, passages: Sequence[Passage], vectors: Vectors, added: str, source: str = "") -> None:
        """A document, in place of one of the same name. vectors: (passages, size); source: the file it was read from."""
        size = int(self.about("size"))
        if vectors.shape != (len(passages), size) or vectors.dtype != np.int16:
            raise ValueError(f"vectors {vectors.shape} of {vectors.dtype} for {len(passages)} passages; it holds int16 of {size}")
        with self._changing():
            self._out(name)
            row = (name, source, sha256, added)
            told = self.db.execute("insert into documents (name, source, sha256, added) values (?, ?, ?, ?)", row)
            for number, (passage, vector) in enumerate(zip(passages, vectors, strict=True)):
                counts = terms(passage.indexed)
                made = (told.lastrowid, number, passage.section, passage.text, counts.total(), vector.tobytes())
                at = self.db.execute(
                    "insert into passages (document, number, section, text, words, vector) values (?, ?, ?, ?, ?, ?)", made
                ).lastrowid
                self.db.executemany("insert into postings values (?, ?, ?)", ((term, at, n) for term, n in counts.items()))

    def remove(self, name: str) -> bool:
        """Whether it was there."""
        with self._changing():
            return self._out(name)

    def documents(self) -> dict[str, tuple[str, str]]:
        """name -> (SHA-256 of the file, where it was read), by name."""
        rows = self.db.execute("select name, sha256, source from documents order by name")
        return {name: (sha256, source) for name, sha256, source in rows}

    def passage(self, document: str, number: int) -> Passage:
        """KeyError where there is none: it may be gone since it was found."""
        joined = "passages p join documents d on d.id = p.document"
        one = f"select p.section, p.text from {joined} where d.name = ? and p.number = ?"
        row = self.db.execute(one, (document, number)).fetchone()
        if row is None:
            raise KeyError(f"{document}, passage {number}")
        return Passage(*row)

    def status(self) -> Status:
        documents = self.db.execute("select count(*) from documents").fetchone()[0]
        passages, words = self.db.execute("select count(*), coalesce(sum(words), 0) from passages").fetchone()
        files = (self.path.with_name(self.path.name + end) for end in ("", "-wal"))
        held = sum(file.stat().st_size for file in files if file.exists())
        return Status(documents, passages, words, self.about("embedder"), int(self.about("size")), held)

    def _out(self, name: str) -> bool:
        found = self.db.execute("select id from documents where name = ?", (name,)).fetchone()
        if found is None:
            return False
        rows = self.db.execute("select id, section, text from passages where document = ?", found).fetchall()
        for at, section, text in rows:  # by what it says: postings need no second order for this
            gone = ((term, at) for term in terms(Passage(section, text).indexed))
            self.db.executemany("delete from postings where term = ? and passage = ?", gone)
        self.db.execute("delete from passages where document = ?", found)
        self.db.execute("delete from documents where id = ?", found)
        return True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One transaction; its `version` tells who holds vectors in memory that they are old."""
        try:
            with self.db:
                self.db.execute("begin immediate")
                yield
                self.db.execute("update about set value = value + 1 where key = 'version'")
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                raise UserError(f"{self.path}: cannot be written to; change its permissions, or those of its folder") from error
            if "locked" in str(error):
                raise UserError(f"{self.path}: another process is changing it; wait for it or end it") from error
            raise RunError(f"{self.path}: {error}; what was added before is kept") from error


def make(path: Path, embedder: str, embedder_sha256: str, size: int, cut: tuple[int, int]) -> Store:
    """A new, empty index: there whole or not. `embedder`: its name; `cut`: tokens of a passage, and of the overlap. Raises
    UserError where there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT, "version": 0, "embedder": embedder, "embedder_sha256": embedder_sha256, "size": size,
        "cut": cut[0], "overlap": cut[1],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".index-") as scratch:
        new = Path(scratch) / "index"
        db = sqlite3.connect(new, isolation_level=None)
        db.execute(f"pragma application_id = {OURS}")
        db.execute("pragma journal_mode = wal")  # readers see the last commit while one writes
        db.executescript(f"begin; {TABLES} commit;")
        db.executemany("insert into about values (?, ?)", ((key, str(value)) for key, value in about.items()))
        db.close()
        try:
            os.link(new, path)
        except FileExistsError:
            raise UserError(f"{path}: another process has just made it; run this again") from None
        except OSError:  # a file system without links
            new.rename(path)
    return load(path)


def load(path: Path) -> Store:
    """Raises UserError where there is none, or one of another version. A file of another program is not touched."""
    if not path.is_file():
        there = "a folder, not an index" if path.is_dir() else "no index there"
        raise UserError(f"{path}: {there}; make one with `fedtailor index add NAME.index DOCUMENTS`")
    with path.open("rb") as file:
        head = file.read(72)
    if head[:16] != b"SQLite format 3\0" or int.from_bytes(head[68:72], "big") != OURS:
        raise UserError(f"{path}: no index of fedtailor; name another file")
    # where nothing can be written, not even a lock, nobody else writes either
    how = "mode=rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, isolation_level=None, timeout=10)
        db.execute("pragma synchronous = full")  # a commit is on the disk, not on its way there
        store = Store(path, db)
        found = store.about("format")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: a damaged index ({error}); delete it and add the documents again") from error
    if found != str(FORMAT):
        db.close()
        raise UserError(f"{path}: an index of format {found}, this fedtailor reads {FORMAT}; add the documents to a new one")
    return store
