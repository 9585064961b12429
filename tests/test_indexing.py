"""Documents into an index, as `fedtailor index` does it, with a tiny embedder of random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Ended
from fedtailor.errors import UserError
from fedtailor.models import Resident
from fedtailor.retrieval import embedding, indexing, store
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.store import SCALE

Command = Callable[..., Ended]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# Cats\nThe cat sat. It slept.\n\n# Dogs\nThe dog ran.\n")
    (folder / "deep" / "b.txt").write_text("A bird sang.")
    (folder / ".hidden.txt").write_text("not to be found")
    (folder / "code.py").write_text("x = 1")
    return folder


def test_vectors_are_the_mean_of_the_models_states(embedder: str, bert: Resident) -> None:
    """Of unit length, and the same as by hand with transformers."""
    import torch

    one = embedding.load(embedder)
    found = one.passages(["the cat", "a much longer text"])
    assert (found.shape, found.dtype) == ((2, one.size), np.int16)
    assert np.linalg.norm(found / SCALE, axis=1) == pytest.approx([1, 1], abs=1e-3)
    bert.tuned()
    ids = bert.tokenizer("the cat", return_tensors="pt")
    with torch.no_grad():
        mean = bert.module(**ids).last_hidden_state[0].mean(0)
    assert np.abs(found[0] / SCALE - torch.nn.functional.normalize(mean, dim=0).numpy()).max() < 1e-3
    assert one.passages([]).shape == (0, one.size)
    assert np.array_equal(one.questions(["the cat"]), found[:1])


def test_an_embedder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embedder 'nobody/nothing': cannot be loaded"):
        embedding.load("nobody/nothing")


def test_added_once_and_again(documents: Path, embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    """What did not change is left, and needs no embedder; what changed is done anew."""
    at = tmp_path / "an.index"
    done = fedtailor("index", "add", at, documents, "--embedder", embedder)
    assert done.code == 0, done.err
    assert "2 new, 0 changed, 0 as they were; holds 2 documents in 3 passages" in done.out
    one, again = indexing.opened(at, "", lambda name: pytest.fail("nothing is to be embedded"))
    with one:
        assert indexing.add(one, again, [documents]).same == 2
        assert one.passage(2)[2].section == "Dogs"
    (documents / "a.md").write_text("# Cats\nThe cat left.\n")
    done = fedtailor("index", "add", at, documents)
    assert "0 new, 1 changed, 1 as they were; holds 2 documents in 2 passages" in done.out
    shown = fedtailor("index", "status", at, "--names").out
    assert "2 documents in 2 passages" in shown
    assert "deep/b.txt" in shown
    assert fedtailor("index", "remove", at, "a.md").out.strip().endswith("1 taken out; holds 1 documents in 1 passages")
    told = fedtailor("index", "remove", at, "b.txt")
    assert told.code == 2
    assert "did you mean 'deep/b.txt'?" in told.errors[0]


def test_the_question_finds_its_passage(documents: Path, embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    at = tmp_path / "an.index"
    fedtailor("index", "add", at, documents, "--embedder", embedder)
    done = fedtailor("index", "search", at, "which dog ran?", "--most", "1")
    assert done.out.startswith("[a.md#Dogs] ")
    assert "The dog ran." in done.out
    assert fedtailor("index", "search", at, " ").code == 2
    assert fedtailor("index", "search", tmp_path / "none", "x").code == 2
    assert not (tmp_path / "none").exists()


def test_bad_files_are_told_and_the_others_go_in(documents: Path, embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    (documents / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    (documents / "empty.txt").write_text("")
    (documents / "noise.txt").write_bytes(bytes(range(256)) * 9)
    (documents / "large.txt").write_text("word " * 3000)
    (documents / "link.txt").symlink_to(tmp_path / "nowhere")
    (documents / "elsewhere").symlink_to(tmp_path)
    (documents / "new\nline.txt").write_text("x")
    (documents / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    done = fedtailor("index", "add", tmp_path / "an.index", documents, "--embedder", embedder, "--largest", "0.01")
    assert done.code == 2
    assert "2 new" in done.out
    said = "\n".join(done.err)
    for line in (
        "bad.pdf: damaged PDF", "empty.txt: no text", "noise.txt: no text in any", "large.txt: 0.015 MB, more than",
        "link.txt: No such file", "elsewhere: a link to a folder; add that one", r"'new\nline.txt': a name that cannot be shown",
        r"'caf\udce9.txt': a name that cannot be shown",
    ):  # fmt: skip
        assert line in said


def test_what_is_gone_or_went_bad_is_told_and_kept(documents: Path, embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    at = tmp_path / "an.index"
    fedtailor("index", "add", at, documents, "--embedder", embedder)
    (documents / "deep" / "b.txt").unlink()
    (documents / "a.md").write_bytes(bytes(range(256)) * 9)
    done = fedtailor("index", "add", at, documents)
    said = "\n".join(done.err)
    assert "a.md: no text in any encoding that is known; save it as UTF-8, or leave it out; its earlier version is kept" in said
    assert "still in the index: deep/b.txt: its file is gone" in said
    assert "holds 2 documents" in done.out
    done = fedtailor("index", "add", at, documents, "--prune")
    assert "taken out: deep/b.txt: its file is gone" in "\n".join(done.err)
    assert "holds 1 documents" in done.out


def test_stopped_in_the_middle_it_goes_on_from_there(
    documents: Path, embedder: str, tmp_path: Path, fedtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, put, done = tmp_path / "an.index", store.Store.put, list[str]()

    def second_stops(self: store.Store, name: str, *more: Any) -> None:
        if done:
            raise KeyboardInterrupt
        put(self, name, *more)
        done.append(name)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "put", second_stops)
        stopped = fedtailor("index", "add", at, documents, "--embedder", embedder)
    assert stopped.code == 130
    assert stopped.err[-1] == f"stopped: {at} holds what is done; the same command goes on from there"
    with store.load(at) as found:
        assert list(found.documents()) == done == ["a.md"]
    assert "1 new, 0 changed, 1 as they were" in fedtailor("index", "add", at, documents).out


def test_a_name_is_one_documents(documents: Path, embedder: str, tmp_path: Path, fedtailor: Command) -> None:
    """A second folder's file of the same name takes nobody's place, unless the first has moved."""
    at, other = tmp_path / "an.index", tmp_path / "other"
    fedtailor("index", "add", at, documents, "--embedder", embedder)
    other.mkdir()
    (other / "a.md").write_text("Another text.")
    done = fedtailor("index", "add", at, other)
    assert done.code == 2
    assert "'a.md' is how" in "\n".join(done.err)
    with store.load(at) as found:
        assert found.passage(1)[2].section == "Cats"
    (documents / "a.md").unlink()
    assert "0 new, 1 changed" in fedtailor("index", "add", at, other).out


def test_a_large_document_goes_in(embedder: str, tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("".join(f"This is sentence number {i}. " for i in range(3000)))
    one, model = indexing.opened(tmp_path / "an.index", embedder, embedding.load)
    with one:
        indexing.add(one, model, [tmp_path / "large.txt"])
        text = " ".join(one.passage(i + 1)[2].text for i in range(one.status().passages))
    assert all(f"number {i}." in text for i in range(3000))


def test_another_embedder_than_the_indexs(documents: Path, embedder: str, tmp_path: Path) -> None:
    at = tmp_path / "an.index"
    one, model = indexing.opened(at, embedder, embedding.load)
    with one:
        indexing.add(one, model, [documents])

    def changed(name: str) -> Embedder:
        found: Any = embedding.load(embedder)
        return Embedder(found.model, name, "1" * 64)

    with pytest.raises(UserError, match=r"whose weights are not those of 'other'; make a new index"):
        indexing.opened(at, "other", changed)
    one, model = indexing.opened(at, "", changed)
    with one:
        (documents / "new.txt").write_text("Something new.")
        with pytest.raises(UserError, match="make a new index"):
            indexing.add(one, model, [documents])
        assert one.status().documents == 2


def test_two_files_of_one_name(documents: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.md").write_text("x")
    with store.make(tmp_path / "an.index", "tiny", "", 3, (20, 4)) as one:
        with pytest.raises(UserError, match=r"would both be cited as 'a\.md'; add the folder that holds both"):
            indexing.add(one, lambda: pytest.fail("never"), [documents, other])
        with pytest.raises(UserError, match="not there"):
            indexing.add(one, lambda: pytest.fail("never"), [tmp_path / "gone"])
        with pytest.raises(UserError, match="no document there"):
            indexing.add(one, lambda: pytest.fail("never"), [_empty(tmp_path)])


def _empty(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"
