"""A file -> its text under its headings. Markdown, HTML, PDF and plain text; each by a library that is kept for it."""

from __future__ import annotations

import codecs
import hashlib
import io
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedtailor import progress
from fedtailor.errors import UserError, suggest


@dataclass(frozen=True)
class Section:
    """What stands under one heading. Of a PDF a page is a section."""

    headings: tuple[str, ...]  # from the document's title down
    text: str  # paragraphs, an empty line between them

    @property
    def name(self) -> str:
        return " > ".join(self.headings)


@dataclass(frozen=True)
class Document:
    name: str  # how it is cited: the path below the folder that was added
    sha256: str  # of the bytes that were read
    sections: tuple[Section, ...]  # none without text


def kinds() -> list[str]:
    """The endings of files that can be read."""
    return sorted(READERS)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, name: str) -> Document:
    """Raises UserError, naming the file, for another kind of file, a damaged one, or one whose letters cannot be made out."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: no kind of document that can be read{suggest(path.suffix.lower(), READERS)}")
    try:
        raw = path.read_bytes()  # once: what is hashed is what is read, even of a file that someone is writing
        sections = _kept([Section(tuple(map(_line, one.headings)), _clean(one.text)) for one in reader(raw, path)])
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # parsers meet a damaged file with whatever they trip over
        raise UserError(f"{path}: damaged {path.suffix[1:].upper()} ({type(error).__name__}: {_line(str(error))})") from error
    return Document(name, hashlib.sha256(raw).hexdigest(), tuple(sections))


def _kept(sections: Sequence[Section]) -> Iterator[Section]:
    """Those with text. A heading that stands for nothing below it is text itself: a file may be all headings."""
    for one, after in pairwise((*sections, None)):
        assert one is not None
        if one.text:
            yield one
        elif one.headings and (after is None or after.headings[: len(one.headings)] != one.headings):
            yield Section(one.headings, one.headings[-1])


NEWLINES = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
FEW = 0.3  # of bytes that are no ASCII: a Western text has fewer


def _decoded(raw: bytes, path: Path) -> str:
    """UTF-8, with or without a mark, or else what its bytes most look like, which is told."""
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"", "utf-8-sig")):
        if raw.startswith(mark) and (text := _as(raw, name)) is not None:
            return NEWLINES.sub("\n", text)
    guess = _guessed(raw)
    if guess is None:
        raise UserError(f"{path}: no text in any encoding that is known; save it as UTF-8, or leave it out")
    progress.line(f"{path}: no UTF-8; read as {guess[1]}, which is a guess")
    return NEWLINES.sub("\n", guess[0])


def _guessed(raw: bytes) -> tuple[str, str] | None:
    if len(BINARY.findall(raw[:65536])) > 4:
        return None
    western = _as(raw, "cp1252")
    if western is not None and sum(byte > 127 for byte in raw) < FEW * len(raw):
        return western, "cp1252"
    from charset_normalizer import from_bytes

    best = from_bytes(raw).best()
    return None if best is None else (str(best), best.encoding)


def _as(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _plain(raw: bytes, path: Path) -> Iterator[Section]:
    if text := _clean(_decoded(raw, path)):
        yield Section((path.stem,), text)


FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


def _markdown(raw: bytes, path: Path) -> Iterator[Section]:
    from markdown_it import MarkdownIt

    text, above, front = _decoded(raw, path), (path.stem,), ""
    if matter := FRONT.match(text):
        front, text = matter[1] + "\n", text[matter.end() :]
        if title := re.search(r"^title:[ \t]*(.+)$", front, re.MULTILINE):
            above = (title[1].strip(" \t'\""),)
    lines = text.split("\n")
    heads = list[tuple[int, int, int, str]]()  # (level, first line, line after it, words)
    tokens = MarkdownIt().enable("table").parse(text)
    for token, inside in pairwise(tokens):
        if token.type == "heading_open" and token.map and token.level == 0:
            heads.append((int(token.tag[1:]), token.map[0], token.map[1], inside.content))
    if begin := _clean(front + "\n".join(lines[: heads[0][1] if heads else None])):
        yield Section(above, begin)
    trail = list[tuple[int, str]]()
    ends = [*(first for _, first, _, _ in heads[1:]), len(lines)]
    for (level, _, begins, words), end in zip(heads, ends, strict=False):
        trail = [*((n, w) for n, w in trail if n < level), (level, words)]
        yield Section(tuple(w for _, w in trail if w) or above, "\n".join(lines[begins:end]))


INLINE = frozenset(
    {"a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins", "kbd", "mark",
     "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"}
)  # fmt: skip
SILENT = frozenset({"script", "style", "noscript", "template", "nav", "head", "svg", "iframe", "object"})
HEADING = re.compile(r"h[1-6]")
META, XML = rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([\w:-]+)""", rb"""<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w:-]+)"""
DECLARED = re.compile(META + b"|" + XML, re.IGNORECASE)


def _html(raw: bytes, path: Path) -> Iterator[Section]:
    from lxml import etree, html

    if not raw.strip():
        return
    parser = html.HTMLParser(remove_comments=True, remove_pis=True, huge_tree=True, encoding="utf-8")
    page = html.document_fromstring(_in_utf8(raw, path), parser=parser)
    if any("LIMIT" in entry.type_name for entry in parser.error_log):
        raise UserError(f"{path}: nested too deeply to be read whole; simplify it, or leave it out")
    title = _line(page.findtext(".//title") or "") or path.stem
    trail, words, paragraphs = list[tuple[int, str]](), list[str](), list[str]()

    def told() -> Section:
        paragraph()
        found = Section(tuple(w for _, w in trail if w) or (title,), "\n\n".join(paragraphs))
        paragraphs.clear()
        return found

    def paragraph() -> None:
        paragraphs.append(" ".join("".join(words).split()))
        words.clear()

    walk = etree.iterwalk(page, events=("start", "end"))
    for event, node in walk:
        tag = str(node.tag)
        if tag not in INLINE:
            paragraph()
        if event == "end":
            words.append(node.tail or "")
        elif _hidden(node):
            walk.skip_subtree()
        elif HEADING.fullmatch(tag):
            if (before := told()).text or trail:
                yield before
            level = int(tag[1])
            trail = [*((n, w) for n, w in trail if n < level), (level, _line(node.text_content()))]
            walk.skip_subtree()
        else:
            words.append(node.text or "")
    if (last := told()).text or trail:
        yield last


def _hidden(node: Any) -> bool:
    """Never shown."""
    style = "".join((node.get("style") or "").lower().split())
    return node.tag in SILENT or node.get("hidden") is not None or "display:none" in style


def _in_utf8(raw: bytes, path: Path) -> bytes:
    """UTF-8 where it is, else the encoding that the page names, else a guess."""
    if _as(raw, "utf-8") is not None:
        return raw
    if declared := DECLARED.search(raw[:4096]):
        text = _as(raw, (declared[1] or declared[2]).decode("ascii"))
        if text is not None:
            return text.encode("utf-8", "replace")
    return _decoded(raw, path).encode("utf-8", "replace")


def _pdf(raw: bytes, path: Path) -> Iterator[Section]:
    try:
        from pypdf import PdfReader
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading PDF needs the extra: pip install 'fedtailor[rag]'") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of whatever it mended
    reader = PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError(f"{path}: locked with a password; save it without one, or leave it out")
    title = (reader.metadata.title if reader.metadata else None) or path.stem
    for number, page in enumerate(reader.pages, 1):
        if text := _clean(NEWLINES.sub("\n", page.extract_text())):
            yield Section((str(title), f"page {number}"), text)


READERS: dict[str, Callable[[bytes, Path], Iterator[Section]]] = {
    ".txt": _plain, ".text": _plain, ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf,
}  # fmt: skip

JOINERS = "\u200c\u200d"  # which some scripts are written with


def _shown(letter: str) -> str:
    """Of spaces of all widths one; none of what is not seen, or would tell a terminal what to do."""
    if letter.isprintable() or letter in JOINERS or letter in "\n\t":
        return letter
    return " " if unicodedata.category(letter)[0] == "Z" else ""


def _clean(text: str) -> str:
    """Paragraphs without spaces around their lines, none of them empty."""
    shown = text if text.isprintable() else "".join(map(_shown, text))
    lines = [line.strip() for line in shown.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _line(text: str) -> str:
    return " ".join("".join(map(_shown, text)).split())
