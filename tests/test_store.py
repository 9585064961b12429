"""An index file: documents in and out whole, whatever happens in between."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.errors import RunError, UserError
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.store import Store, Vectors, load, make

TWO = (Passage("T", "the cat sat"), Passage("T", "the dog and the cat"))


def vectors(count: int, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).integers(-32767, 32767, (count, 4)).astype(np.int16)


@pytest.fixture
def index(tmp_path: Path) -> Store:
    return make(tmp_path / "an.index", "tiny", "0" * 64, 4, (20, 4))


def postings(index: Store) -> int:
    return int(index.db.execute("select count(*) from postings").fetchone()[0])


def test_in_and_out(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    assert index.documents() == {"a.md": ("s1", "")}
    status = index.status()
    assert (status.documents, status.passages, status.words, status.embedder, status.size) == (1, 2, 4 + 6, "tiny", 4)
    assert postings(index) == 4 + 5, "t the cat sat; t the dog and cat"
    assert index.passage(2) == (1, "a.md", TWO[1])
    with pytest.raises(KeyError):
        index.passage(3)
    assert index.remove("a.md")
    assert not index.remove("a.md")
    assert (index.status().passages, postings(index)) == (0, 0)


def test_a_document_takes_the_place_of_one_of_its_name(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    before = index.about("version")
    index.put("a.md", "s2", TWO[:1], vectors(1), "later")
    assert index.documents() == {"a.md": ("s2", "")}
    assert (index.status().passages, postings(index)) == (1, 4)
    assert index.about("version") != before


change = st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from(["x y", "y z z", "w"]), max_size=3))


@settings(max_examples=25)
@given(st.lists(change, max_size=8))
def test_whatever_the_order_it_holds_what_was_put_last(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, list[str]]]
) -> None:
    """Putting nothing is taking out. Compared with an index into which only the last of each were put."""
    folder = tmp_path_factory.mktemp("index")
    one, other = (make(folder / name, "tiny", "", 4, (20, 4)) for name in ("one", "other"))
    with one, other:
        for name, texts in changes:
            if texts:
                one.put(name, "s", [Passage("T", text) for text in texts], vectors(len(texts)), "now")
            else:
                one.remove(name)
        for name, texts in dict(changes).items():
            if texts:
                other.put(name, "s", [Passage("T", text) for text in texts], vectors(len(texts)), "now")
        assert one.documents() == other.documents()
        count = "select term, count(*), sum(count) from postings group by term order by term"
        assert one.db.execute(count).fetchall() == other.db.execute(count).fetchall()


def test_wrong_vectors_change_nothing(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    with pytest.raises(ValueError, match="for 1 passages"):
        index.put("a.md", "s2", TWO[:1], vectors(2), "now")
    with pytest.raises(ValueError, match="float64"):
        index.put("a.md", "s2", TWO, np.zeros((2, 4)), "now")  # type: ignore[arg-type]
    assert index.documents() == {"a.md": ("s1", "")}


WRITER = """
import sys
from pathlib import Path
import numpy as np
from fedtailor.retrieval.cutting import Passage
from fedtailor.retrieval.store import load
with load(Path(sys.argv[1])) as index:
    for i in range(100000):
        passages = [Passage("T", f"word{i} word{j}") for j in range(40)]
        index.put(f"{i % 7}.md", str(i), passages, np.zeros((40, 4), np.int16), "now")
        print(i, flush=True)
"""


def test_a_kill_in_the_middle_leaves_whole_documents(index: Store, tmp_path: Path) -> None:
    """Killed three times while it writes: all that was said to be in is in, each document with all of its passages."""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(index.path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        last = [writer.stdout.readline() for _ in range(9)][-1].strip()
        time.sleep(0.05)
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().split()
        writer.wait()
        last = said[-1] if said else last
        with load(index.path) as found:
            held = found.documents()
            assert int(held[f"{int(last) % 7}.md"][0]) >= int(last)
            of = "select count(*), count(distinct number) from passages group by document"
            assert set(found.db.execute(of)) == {(40, 40)}
            assert found.db.execute("select count(distinct document) from passages").fetchone()[0] == len(held)
            assert found.db.execute("pragma integrity_check").fetchone()[0] == "ok"
            lost = "select count(*) from postings where passage not in (select id from passages)"
            assert found.db.execute(lost).fetchone()[0] == 0


def test_what_is_no_index_is_told_and_not_touched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index there; make one with `fedtailor index add"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="a folder, not an index"):
        load(tmp_path)
    (tmp_path / "text").write_text("some other file " * 100)
    (tmp_path / "empty").touch()
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("create table x (y)")
        other.commit()
    for name in ("text", "empty", "other"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match="no index of fedtailor; name another file"):
            load(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_a_damaged_index(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    index.db.close()
    index.path.write_bytes(index.path.read_bytes()[:100] + b"x" * 3000)
    with pytest.raises(UserError, match="a damaged index"):
        load(index.path)


def test_it_is_made_once_and_whole(index: Store) -> None:
    with pytest.raises(UserError, match="another process has just made it"):
        make(index.path, "tiny", "", 4, (20, 4))
    assert [path.name for path in index.path.parent.iterdir() if path.name.startswith(".index")] == []


def test_what_is_read_within_is_of_one_state(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    with load(index.path) as other, other.snapshot():
        before = other.about("version")
        index.remove("a.md")
        assert other.passage(1) == (1, "a.md", TWO[0])
        assert other.about("version") == before
    with load(index.path) as other, pytest.raises(KeyError):
        other.passage(1)


def test_an_index_that_may_not_be_written_can_be_read(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    index.db.close()
    before = index.path.read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may everything
    with load(index.path) as found:
        assert found.status().documents == 1
        with pytest.raises(UserError, match="cannot be written to; change its permissions"):
            found.remove("a.md")
    assert index.path.read_bytes() == before


def test_an_index_of_another_format(index: Store) -> None:
    index.db.execute("update about set value = '99' where key = 'format'")
    with pytest.raises(UserError, match="of format 99, this fedtailor reads 2"):
        load(index.path)


def test_a_full_disk_keeps_what_was_added_before(index: Store) -> None:
    index.put("a.md", "s1", TWO, vectors(2), "now")
    pages = index.db.execute("pragma page_count").fetchone()[0]
    index.db.execute(f"pragma max_page_count = {pages + 1}")
    with pytest.raises(RunError, match="full; what was added before is kept"):
        index.put("b.md", "s1", [Passage("T", "word " * 9000)] * 9, vectors(9), "now")
    assert index.documents() == {"a.md": ("s1", "")}


def test_two_writers(index: Store) -> None:
    other = sqlite3.connect(index.path, isolation_level=None)
    other.execute("begin immediate")
    index.db.execute("pragma busy_timeout = 50")
    with pytest.raises(UserError, match="another process is changing it"):
        index.put("a.md", "s1", TWO, vectors(2), "now")
    other.execute("rollback")
    index.put("a.md", "s1", TWO, vectors(2), "now")
