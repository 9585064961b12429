"""Frequently asked questions that communities keep in Debian packages, and the manuals beside them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtailor import fetch
from fedtailor.demo import _markup
from fedtailor.demo._markup import Block, tidy

LICENCE = "the documents' own: Artistic/GPL (perl), PSF (python), GPL (debian, r, tools), lsof's; not redistributed"

PACKAGES = (
    "perl-doc", "python3.11-doc", "debian-faq", "r-doc-html", "git-man", "sed", "zlib1g-dev", "xz-utils", "valgrind",
    "lsof",
)
PASSAGE_WORDS = 180  # paragraphs are packed up to this
PARAGRAPH_WORDS = 220  # a longer one is cut in pieces of PASSAGE_WORDS
QUESTION = re.compile(r"(?<!\. )\?$|^(How|Why|I (copied|try|installed)|My class) ")
QUESTION_LENGTH = 240  # characters; what is longer is a story


@dataclass(frozen=True)
class Answer:
    id: str
    silo: str
    section: str
    question: str
    answer: str
    source: str


@dataclass(frozen=True)
class Passage:
    id: str
    silo: str
    section: str
    source: str
    text: str
    answers: str | None  # the id of the question; None for a page of a manual


def collect() -> tuple[list[Answer], list[Passage]]:
    with fetch.deb(PACKAGES) as found:
        return read(found)


def read(folders: Mapping[str, Path]) -> tuple[list[Answer], list[Passage]]:
    """From the unpacked packages. Answers of fewer than 12 words, and questions asked before, are left out."""
    answers: list[Answer] = []
    numbers: dict[str, int] = {}
    asked = set()
    for silo, section, question, answer, source in _questions(folders):
        if _worth_asking(question, answer) and question.casefold() not in asked:
            asked.add(question.casefold())
            number = numbers[silo] = numbers.get(silo, -1) + 1
            answers.append(Answer(f"{silo}-{number:03d}", silo, section, question, answer, source))
    passages = [
        Passage(f"{each.id}#{n}", each.silo, each.section, each.source, text, each.id)
        for each in answers for n, text in enumerate(pieces(each.answer.split("\n\n")))
    ]
    for silo, source, paragraphs in _manuals(folders):
        texts = [text for text in pieces(paragraphs) if len(text.split()) >= 25]
        passages += [Passage(f"{silo}-x-{source}#{n}", silo, "", source, text, None) for n, text in enumerate(texts)]
    return answers, passages


def _worth_asking(question: str, answer: str) -> bool:
    return len(question) <= QUESTION_LENGTH and len(answer) >= 70 and len(answer.split()) >= 12


def pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Passages of whole paragraphs, as many as fit in PASSAGE_WORDS; only an overlong paragraph is cut."""
    packed: list[str] = []
    for paragraph in paragraphs:
        words = paragraph.split()
        if packed and sum(len(text.split()) for text in packed) + len(words) > PASSAGE_WORDS:
            yield "\n\n".join(packed)
            packed = []
        if len(words) > PARAGRAPH_WORDS:
            yield from (" ".join(words[start : start + PASSAGE_WORDS]) for start in range(0, len(words), PASSAGE_WORDS))
        else:
            packed.append(paragraph)
    if packed:
        yield "\n\n".join(packed)


def asked_in(blocks: Iterable[Block], depth: int) -> Iterator[tuple[str, str, str]]:
    """(section, question, answer) for headings of `depth` or deeper that ask something. Headings deeper than the
    question's become `Heading: text` in its answer."""
    section = question = title = ""
    level = 0
    paragraphs: list[str] = []
    for kind, text in blocks:
        if kind == "p":
            paragraphs.append(f"{title}: {text}" if title else text)
            title = ""
            continue
        plain = re.sub(r"^(Chapter\s+)?[\d.]+\s+", "", text)
        here = int(kind[1:])
        if question and here > level:
            title = plain
            continue
        if question:
            yield section, question, "\n\n".join(paragraphs)
        paragraphs, question, title = [], "", ""
        if here >= depth and QUESTION.search(plain):
            question, level = plain, here
        elif here < depth:
            section = plain
    if question:
        yield section, question, "\n\n".join(paragraphs)


def numbered(text: str, heading: str = r"\d+(?:\.\d+)*\.?") -> Iterator[tuple[str, str]]:
    """(question, answer) of a text file whose questions are numbered, from the margin. A question goes on until a line
    ends in a question mark, or a line is empty. The table of contents looks the same, but has no answers."""
    parts = re.split(rf"^ ?{heading}[ \t]+(?=\S)", text, flags=re.MULTILINE)
    for part in parts[1:]:
        match = re.match(r"(.*?(?:\?\s*?$|\n[ \t]*\n))(.*)", part, re.DOTALL | re.MULTILINE)
        if match:
            question = " ".join(match[1].split())
            # A line of dashes closes the section; what follows it is the title of the next.
            body = re.sub(r"^[-=_]{10,}.*?(^[-=_]{10,}\s*$|\Z)", "", match[2], flags=re.MULTILINE | re.DOTALL)
            if question.endswith("?") and QUESTION.search(question):
                yield question, tidy(body, margin=False)


def _questions(folders: Mapping[str, Path]) -> Iterator[tuple[str, str, str, str, str]]:
    """(silo, section, question, answer, source)"""
    for path in _find(folders["perl-doc"], "pod/perlfaq[1-9].pod"):
        yield from (("perl", *found, path.name) for found in asked_in(_markup.pod(_text(path)), 2))
    for path in _find(folders["python3.11-doc"], "_sources/faq/*.rst.txt"):
        name = path.name.split(".")[0]
        for _, question, answer in asked_in(_markup.rst(_text(path)), 2):
            yield "python", name, question, answer, f"faq/{path.name}"
    for path in _find(folders["debian-faq"], "FAQ/*.en.html"):
        yield from (("debian", *found, path.name) for found in asked_in(_body(path), 2))
    for path in _find(folders["r-doc-html"], "R-FAQ.html")[:1]:
        yield from (("r", *found, path.name) for found in asked_in(_body(path), 3))
    for path in _find(folders["git-man"], "gitfaq.7.gz"):
        yield from (("tools", "git", *found, "gitfaq(7)") for found in _terms(_markup.man(_text(path))))
    for package, pattern, section, source, cut in (
        ("sed", "sedfaq.txt.gz", "sed", "sedfaq.txt.gz", numbered),
        ("valgrind", "FAQ.txt.gz", "valgrind", "FAQ.txt.gz", numbered),
        ("zlib1g-dev", "FAQ.gz", "zlib", "FAQ.gz", numbered),
        ("xz-utils", "faq.txt.gz", "xz", "xz/faq.txt", _marked),
        ("lsof", "00FAQ.gz", "lsof", "00FAQ.gz", numbered),
    ):
        reader: Callable[[str], Iterator[tuple[str, str]]] = cut
        for path in _find(folders[package], pattern):
            silo = "lsof" if package == "lsof" else "tools"
            yield from ((silo, section, *found, source) for found in reader(_text(path)))


def _manuals(folders: Mapping[str, Path]) -> Iterator[tuple[str, str, list[str]]]:
    """(silo, source, paragraphs)"""
    for name in ("intro", "requick", "reftut", "opentut", "trap", "dsc", "unitut"):
        for path in _find(folders["perl-doc"], f"pod/perl{name}.pod"):
            yield "perl", path.stem, _paragraphs(_markup.pod(_text(path)))
    for path in _find(folders["python3.11-doc"], "_sources/tutorial/*.rst.txt"):
        yield "python", f"tutorial/{path.name.split('.')[0]}", _paragraphs(_markup.rst(_text(path)))
    for path in _find(folders["r-doc-html"], "R-intro.html")[:1]:
        title, paragraphs = "", list[str]()
        for kind, text in [*_body(path), ("h1", "")]:
            if kind == "p":
                paragraphs.append(text)
                continue
            if paragraphs:
                yield "r", f"R-intro:{title[:40]}", paragraphs
            title, paragraphs = text, []
    for name in ("gittutorial", "gitworkflows", "giteveryday", "gitcore-tutorial", "gitglossary"):
        for path in _find(folders["git-man"], f"{name}.7.gz"):
            yield "tools", name, _paragraphs(_markup.man(_text(path)))


def _body(path: Path) -> Iterator[Block]:
    """Without the tables of contents and the bars that lead to other pages."""
    text = re.sub(
        r'<div class="(navheader|navfooter|header|toc)">.*?</div>|<ul class="section-toc">.*?</ul>', "", _text(path),
        flags=re.DOTALL,
    )
    return _markup.html(text)


def _terms(blocks: Iterable[Block]) -> Iterator[tuple[str, str]]:
    question = ""
    paragraphs: list[str] = []
    for kind, text in [*blocks, ("q", "")]:
        if kind == "p":
            paragraphs.append(text)
            continue
        if question:
            yield question, "\n\n".join(paragraphs)
        question, paragraphs = (text if kind == "q" and QUESTION.search(text) else ""), []


def _marked(text: str) -> Iterator[tuple[str, str]]:
    """`Q:` and `A:` at the margin."""
    for part in re.split(r"^Q:", text, flags=re.MULTILINE)[1:]:
        question, _, answer = part.partition("\nA:")
        yield " ".join(question.split()), tidy(answer, margin=False)


def _paragraphs(blocks: Iterable[Block]) -> list[str]:
    return [text for kind, text in blocks if kind in ("p", "q")]


def _find(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def _text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", errors="replace")
