"""A silo's index on disk: one SQLite file. A document goes in, or out, in one transaction: after a kill it is whole or not there.

Vectors are whole numbers of 16 bits, so a score is an exact sum, the same whatever else is in the index: silos searched apart
give what one index over all of them would, ties included. DESIGN.md says what else was measured.
"""

from __future__ import annotations

import os
import secrets
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
FORMAT = 2
OURS = 0x66746978  # "ftix", in the file's head
TABLES = """
create table about (key text primary key, value text not null) without rowid;
create table documents (
    id integer primary key autoincrement, name text not null unique, source text not null, sha256 text not null,
    added text not null, shareable integer not null default 0);
create table passages (
    id integer primary key autoincrement, document integer not null references documents, number integer not null,
    section text not null, text text not null, words integer not null, vector blob not null);
create index passages_of on passages (document, number);
create table postings (term integer, passage integer, count integer not null, primary key (term, passage)) without rowid;
create table others (embedder text, passage integer, vector blob not null, primary key (embedder, passage)) without rowid;
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

    @property
    def version(self) -> str:
        """Of what it holds: another one after each change, and in another file."""
        return f"{self.about('secret')} {self.about('version')}"

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within is of one state, whatever another process does meanwhile."""
        self.db.execute("begin")
        try:
            yield
        finally:
            self.db.execute("rollback")

    def put(
        self, name: str, sha256: str, passages: Sequence[Passage], vectors: Vectors, added: str, source: str = "",
        shareable: bool = False,
    ) -> None:  # fmt: skip
        """A document, in place of one of the same name. vectors: (passages, size); source: the file it was read from."""
        self._fit(vectors, len(passages))
        with self._changing():
            self._out(name)
            row = (name, source, sha256, added, shareable)
            insert = "insert into documents (name, source, sha256, added, shareable) values (?, ?, ?, ?, ?)"
            told = self.db.execute(insert, row)
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

    def share(self, names: Sequence[str], shareable: bool) -> None:
        """Whether a silo whose policy lets out tagged documents alone lets these out."""
        with self._changing():
            tagged = "update documents set shareable = ? where name = ?"
            self.db.executemany(tagged, ((shareable, name) for name in names))

    def shareable(self) -> set[str]:
        return {name for (name,) in self.db.execute("select name from documents where shareable")}

    def lacking(self, embedder_sha256: str) -> list[tuple[int, Passage]]:
        """(number, passage) of what has no vector by this embedder yet."""
        if embedder_sha256 == self.about("embedder_sha256"):
            return []
        without = "select id, section, text from passages where id not in (select passage from others where embedder = ?)"
        rows = self.db.execute(f"{without} order by id", (embedder_sha256,)).fetchall()
        return [(at, Passage(section, text)) for at, section, text in rows]

    def embed(self, embedder_sha256: str, passages: Sequence[int], vectors: Vectors) -> None:
        """These passages' vectors by another embedder, beside the index's own. One that is gone meanwhile is left out."""
        self._fit(vectors, len(passages))
        with self._changing():
            put = "insert or replace into others select ?, id, ? from passages where id = ?"
            pairs = zip(passages, vectors, strict=True)
            self.db.executemany(put, ((embedder_sha256, vector.tobytes(), at) for at, vector in pairs))

    def keep(self, embedder_sha256: str, others: int = 4) -> None:
        """This embedder's vectors, and those by so many others that were kept last; a run beside may be at work with one."""
        with self._changing():
            order = [one for one in self.about("others").split() if one != embedder_sha256]
            kept = [embedder_sha256, *order[:others]]
            self.db.execute("insert or replace into about values ('others', ?)", (" ".join(kept),))
            marks = ", ".join("?" * len(kept))
            self.db.execute(f"delete from others where embedder not in ({marks})", kept)

    def documents(self) -> dict[str, tuple[str, str]]:
        """name -> (SHA-256 of the file, where it was read), by name."""
        rows = self.db.execute("select name, sha256, source from documents order by name")
        return {name: (sha256, source) for name, sha256, source in rows}

    def passage(self, at: int) -> tuple[int, str, Passage]:
        """The document's number and name, and the passage. KeyError where there is none: it may be gone since it was found."""
        joined = "passages p join documents d on d.id = p.document"
        row = self.db.execute(f"select d.id, d.name, p.section, p.text from {joined} where p.id = ?", (at,)).fetchone()
        if row is None:
            raise KeyError(f"{self.path}: no passage {at}")
        return row[0], row[1], Passage(*row[2:])

    def document(self, name: str) -> tuple[list[Passage], Vectors]:
        """Its passages in their order, and their vectors (passages, size) by the index's own embedder."""
        joined = "passages p join documents d on d.id = p.document"
        ordered = f"select p.section, p.text, p.vector from {joined} where d.name = ? order by p.number"
        rows = self.db.execute(ordered, (name,)).fetchall()
        vectors = np.frombuffer(b"".join(row[2] for row in rows), np.int16).reshape(len(rows), int(self.about("size")))
        return [Passage(section, text) for section, text, _ in rows], vectors

    def embedders(self) -> set[str]:
        """SHA-256 of each that passages have vectors by; the index's own is one."""
        return {self.about("embedder_sha256"), *(one for (one,) in self.db.execute("select distinct embedder from others"))}

    def passages(self) -> Iterator[tuple[int, str, Passage]]:
        """(number, the document's name, passage) of all."""
        joined = "passages p join documents d on d.id = p.document"
        for at, name, section, text in self.db.execute(f"select p.id, d.name, p.section, p.text from {joined} order by p.id"):
            yield at, name, Passage(section, text)

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
        self.db.execute("delete from others where passage in (select id from passages where document = ?)", found)
        self.db.execute("delete from passages where document = ?", found)
        self.db.execute("delete from documents where id = ?", found)
        return True

    def _fit(self, vectors: Vectors, count: int) -> None:
        size = int(self.about("size"))
        if vectors.shape != (count, size) or vectors.dtype != np.int16:
            raise ValueError(f"vectors {vectors.shape} of {vectors.dtype} for {count} passages; it holds int16 of {size}")

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
        "cut": cut[0], "overlap": cut[1], "secret": secrets.token_hex(16),  # of the noise on what is told for routing
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
        place = f"{path.resolve().as_uri()}?{how}"
        db = sqlite3.connect(place, uri=True, isolation_level=None, timeout=10, check_same_thread=False)
        db.execute("pragma synchronous = full")  # a commit is on the disk, not on its way there
        store = Store(path, db)
        found = store.about("format")
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: a damaged index ({error}); delete it and add the documents again") from error
    if found != str(FORMAT):
        db.close()
        raise UserError(f"{path}: an index of format {found}, this fedtailor reads {FORMAT}; add the documents to a new one")
    return store
