"""Builders on tiny archives made here; the real sets under the mark needs_data."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from fedtailor import demo
from fedtailor.data import Data, load
from fedtailor.demo import _debian, _faq, _markup, descriptions, facets, faq, faq_passages, fashion_mnist, sentiment
from fedtailor.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_set_is_found_by_its_file() -> None:
    assert demo.names() == ["descriptions", "facets", "faq", "faq_passages", "fashion_mnist", "sentiment"]
    for name in demo.names():
        found = demo.find(name)
        assert found.DESCRIPTION
        assert found.LICENCE
        assert "\n" not in found.DESCRIPTION + found.LICENCE
    with pytest.raises(UserError, match="'sentimet' is unknown; did you mean 'sentiment'"):
        demo.find("sentimet")


def test_built_once_and_again_when_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build() -> list[dict[str, str]]:
        built.append(1)
        return [{"text": "grün", "silo": "a"}]

    monkeypatch.setattr(sentiment, "build", build)
    path = demo.fetch("sentiment")
    assert path.read_text(encoding="utf-8") == '{"text": "grün", "silo": "a"}\n'
    assert demo.fetch("sentiment") == path
    assert len(built) == 1
    assert (cache / "data" / "sentiment.sha256").read_text().split()[1] == path.name
    path.write_text("half")
    assert demo.fetch("sentiment") == path
    assert demo.fetch("sentiment", again=True) == path
    assert len(built) == 3
    assert sorted(p.name for p in cache.rglob("*") if p.is_file()) == [path.name, "sentiment.sha256"]


def test_a_failed_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> list[dict[str, str]]:
        raise UserError("no network")

    monkeypatch.setattr(sentiment, "build", build)
    with pytest.raises(UserError, match="no network"):
        demo.fetch("sentiment")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_split_of_is_eight_one_one() -> None:
    counts = Counter(demo.split_of(f"doc {n}") for n in range(3000))
    assert 2300 < counts["train"] < 2500
    assert 240 < counts["valid"] < 360
    assert 240 < counts["test"] < 360


def corpus(path: Path, tweets: list[tuple[str, float, str]]) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for stem in sentiment.SILOS.values():
            rows = tweets if stem == "tweets" else []
            for name, text, encoding in (
                ("GroundTruth", "".join(f"{n}\t{mean}\t{said}\r\n" for n, mean, said in rows), "cp1252"),
                ("anonDataRatings", "".join(f"{n}\t{mean}\t0.5\t[1]\n" for n, mean, _ in rows), "utf-8-sig"),
            ):
                add(archive, f"hutto_ICWSM_2014/{stem}_{name}.txt", text.encode(encoding))
    with tarfile.open(path, "w:gz") as archive:
        add(archive, sentiment.MEMBER, inner.getvalue())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_sentiment(tmp_path: Path) -> None:
    corpus(tmp_path / "s.tar.gz", [
        ("1_1", -0.5, "Not good &amp;amp; not fine"), ("1_2", -0.499, "So–so"), ("2_1", 0.5, "Nice"), ("2_2", 3, "NICE!"),
        ("3_1", 0.0, "..."),
    ])
    rows = sentiment.from_sdist(tmp_path / "s.tar.gz")
    assert [(row["id"], row["text"], row["label"]) for row in rows] == [
        ("tweets:1_1", "Not good & not fine", "negative"), ("tweets:1_2", "So–so", "neutral"), ("tweets:2_1", "Nice", "positive"),
    ]
    assert rows[0] == {
        "id": "tweets:1_1", "silo": "tweets", "text": "Not good & not fine", "label": "negative", "score": -0.5,
        "rater_sd": 0.5, "doc": "tweets:1", "split": demo.split_of("tweets:1"),
    }
    assert rows[0]["split"] == rows[1]["split"]


LONG = "\n " + "\n ".join(["Alpha counts words and lines in long files.", ".", *["It also sorts them by length and name."] * 8])


def entry(name: str, synopsis: str = "counts words in files", **more: str) -> dict[str, str]:
    return {"Package": name, "Section": "text", "Description": synopsis, "Description-md5": "m", **more}


def told(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"Package": e["Package"], "Description-md5": "m", "Description-en": e["Description"] + LONG} for e in entries]


def test_packages_that_say_something() -> None:
    entries = [
        entry("zeta", Source="omega (1.0)"), entry("alpha", Tag="role::program, use::counting,\n works-with::text"),
        entry("alpha", "newer entry of the same name"), entry("alpha-dev", "counts words for programs", Source="alpha"),
        entry("beta", "Counts words in files"), entry("gamma", "data files for counting"), entry("delta", "too short"),
        entry("lib", "counts words in libraries", Section="libs"), entry("eta", "counts words by hand", Source="omega"),
    ]
    chosen = _debian.select(entries, told(entries))
    assert [(p.name, p.source) for p in chosen] == [("alpha", "alpha"), ("eta", "omega")]
    assert chosen[0].tags == ("role::program", "use::counting", "works-with::text")
    assert chosen[0].text.startswith("Alpha counts words and lines in long files. It also sorts")


def test_descriptions_and_facets() -> None:
    entries = [entry("alpha", Tag="role::program, use::counting, use::TODO, works-with::text, interface::text-mode")]
    packages = _debian.select(entries, told(entries))
    row = descriptions.rows(packages)[0]
    assert (row["id"], row["silo"], row["output"]) == ("alpha", "text", "counts words in files")
    # 8 words, then sentences of 8: eight of them are 64, the ninth would be the 72nd word
    assert len(row["input"].split()) == 64
    assert facets.rows(packages)[0]["input"] == (
        "name[alpha], section[text], use[counting], works with[text], interface[text mode]"
    )
    assert facets.rows(_debian.select([entry("alpha", Tag="role::program, use::counting")], told(entries))) == []


def test_shortened_keeps_words_where_sentences_do_not_fit() -> None:
    assert descriptions.shortened("Short. " + "word " * 80) == " ".join(["Short.", *["word"] * 69])


def test_fashion_mnist(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("t10k", 2)):
        images = struct.pack(">IIII", 0x803, count, 2, 2) + bytes(range(4 * count))
        labels = struct.pack(">II", 0x801, count) + bytes([9, 0, 5][:count])
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    rows = fashion_mnist.from_folder(tmp_path)
    assert [row["label"] for row in rows] == ["ankle boot", "t-shirt", "sandal", "ankle boot", "t-shirt"]
    assert rows[1]["image"] == bytes([4, 5, 6, 7])
    assert [row["split"] for row in rows[3:]] == ["test", "test"]


def test_pictures_are_kept_as_parquet(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "build", lambda: [{"id": "1", "image": b"\x00\xff"}])
    path = demo.fetch("fashion_mnist")
    assert path.suffix == ".parquet"
    from fedtailor.sources import READERS

    assert READERS[".parquet"](path, path.name).rows == [{"id": "1", "image": b"\x00\xff"}]


def test_pod() -> None:
    text = (
        "=head1 Data\n\n=head2 Why C<x>?X<x>\n\nSee L<the page|http://a/b> and\nB<this E<lt> that>.\n\n"
        "    my $x;\n\n=item * one\n"
    )
    assert list(_markup.pod(text)) == [
        ("h1", "Data"), ("h2", "Why x?"), ("p", "See the page and this < that."), ("p", "my $x;"), ("p", "* one"),
    ]


def test_rst() -> None:
    text = (
        ".. _top:\n\n=====\nTitle\n=====\n\nHow?\n----\n\nUse :func:`len` or `this <http://a>`_::\n\n   len(x)\n\n"
        ".. only:: html\n\n   .. contents::\n\n.. code-block:: sh\n\n   ls\n"
    )
    assert list(_markup.rst(text)) == [("h1", "Title"), ("h2", "How?"), ("p", "Use len or this:"), ("p", "len(x)"), ("p", "ls")]


def test_man() -> None:
    text = '.SH "NAME"\nx \\- \\fBy\\fR\n.PP\nHow do I\nit?\n.RS 4\nLike this\\&.\n.sp\nIt\\(cqs so:\n.nf\na\n  b\n.fi\n.RE\n'
    assert list(_markup.man(text)) == [
        ("h1", "NAME"), ("p", "x - y"), ("q", "How do I it?"), ("p", "Like this."), ("p", "It’s so:"), ("p", "a\n b"),
    ]


def test_html() -> None:
    text = "<title>no</title><h2>1.2. Why <b>so</b>?</h2><p>Be&shy;cause &lt;it&gt;</p><ul><li>is</li></ul>"
    assert list(_markup.html(text)) == [("h2", "1.2. Why so?"), ("p", "Be\xadcause <it>"), ("p", "is")]


def test_headings_that_ask() -> None:
    blocks = [("h1", "Chapter 1. Things"), ("p", "intro"), ("h2", "1.1. Why?"), ("p", "So."), ("h3", "Note"), ("p", "n"),
              ("h2", "Remarks"), ("p", "skipped"), ("h2", "How to?"), ("p", "Thus.")]
    assert list(_faq.asked_in(blocks, 2)) == [("Things", "Why?", "So.\n\nNote: n"), ("Things", "How to?", "Thus.")]


def test_numbered_questions() -> None:
    text = (
        "Contents\n1.1 What is\n  it?\n1.2 Remark\n\n1.1. What is\n  it?\n   A  thing.\n\n   Indeed.\n"
        "------------\n2. More\n------------\n\n1.2 Remark\n\nx\n"
    )
    assert list(_faq.numbered(text))[-1] == ("What is it?", "A thing.\n\nIndeed.")


def test_passages_are_whole_paragraphs() -> None:
    a, b, c, d = (" ".join(["w"] * n) for n in (100, 80, 1, 400))
    assert list(_faq.pieces([a, b, c])) == [f"{a}\n\n{b}", c]
    assert [len(text.split()) for text in _faq.pieces([c, d])] == [1, 180, 180, 40]


def test_questions_and_their_passages(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in _faq.PACKAGES}
    for folder in folders.values():
        folder.mkdir()
    answer = " ".join(f"word{n}" for n in range(30))
    text = f" 1. Why so?\n\n  {answer}\n\n 2. Short?\n\n  No.\n"
    (tmp_path / "zlib1g-dev" / "FAQ.gz").write_bytes(gzip.compress(text.encode()))
    pods = tmp_path / "perl-doc" / "pod"
    pods.mkdir()
    (pods / "perlintro.pod").write_text(f"=head1 NAME\n\n{answer}\n")
    answers, passages = _faq.read(folders)
    assert faq.rows(answers) == [
        {"silo": "tools", "section": "zlib", "question": "Why so?", "answer": answer, "source": "FAQ.gz", "id": "tools-000"}
    ]
    assert [(row["pid"], row["qa_id"], row["text"]) for row in faq_passages.rows(passages)] == [
        ("tools-000#0", "tools-000", answer), ("perl-x-perlintro#0", None, answer)
    ]


@pytest.mark.needs_data
def test_the_real_sentiment_set() -> None:
    path = demo.fetch("sentiment")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert Counter(row["silo"] for row in rows) == {
        "tweets": 4045, "product_reviews": 3686, "movie_reviews": 10602, "news_editorials": 5113
    }
    assert Counter(row["label"] for row in rows if row["silo"] == "movie_reviews") == {
        "negative": 5074, "neutral": 533, "positive": 4995
    }
    assert Counter(row["split"] for row in rows) == {"train": 18725, "valid": 2345, "test": 2376}
    loaded = load(Data("sentiment", template="{text}\nSentiment:", label="label", silo_column="silo"), {}, 0)
    assert loaded.silos["tweets"].labels == ("negative", "neutral", "positive")


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "rows", "silos"),
    [("descriptions", 8792, 16), ("facets", 3590, 24), ("faq", 1052, 6), ("faq_passages", 2300, 6)],
)
def test_the_real_sets_from_debian(name: str, rows: int, silos: int) -> None:
    # Debian's archive moves on, so the counts are near those of bookworm in late 2026
    found = [json.loads(line) for line in demo.fetch(name).read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(found) == pytest.approx(rows, rel=0.1)
    assert len({row["silo"] for row in found}) == silos
