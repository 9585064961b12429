"""A file -> its text under its headings. Markdown, HTML, PDF and plain text; each by a library that is kept for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    sha256: str  # of the file
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
        sections = tuple(section for section in reader(path) if section.text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return Document(name, digest(path), sections)


def _decoded(path: Path) -> str:
    """UTF-8, with or without a mark, or else what its bytes most look like."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = None if b"\0" in raw[:4096] and raw[:2] not in (b"\xff\xfe", b"\xfe\xff") else from_bytes(raw).best()
        if best is None:
            raise UserError(f"{path}: no text in any encoding that is known; save it as UTF-8, or leave it out") from None
        return str(best)


def _plain(path: Path) -> Iterator[Section]:
    yield Section((path.stem,), _paragraphs(_decoded(path).split("\n\n")))


def _markdown(path: Path) -> Iterator[Section]:
    from markdown_it import MarkdownIt

    text = _decoded(path)
    lines = text.splitlines()
    heads = list[tuple[int, int, int, str]]()  # (level, first line, line after it, words)
    tokens = MarkdownIt().enable("table").parse(text)
    for token, inside in pairwise(tokens):
        if token.type == "heading_open" and token.map and token.level == 0:
            heads.append((int(token.tag[1:]), token.map[0], token.map[1], inside.content.strip()))
    above = (path.stem,)
    yield Section(above, _paragraphs("\n".join(lines[: heads[0][1] if heads else None]).split("\n\n")))
    trail = list[tuple[int, str]]()
    for (level, _, begin, words), end in zip(heads, [*(head[1] for head in heads[1:]), len(lines)], strict=True):
        trail = [*((n, w) for n, w in trail if n < level), (level, words)]
        yield Section(tuple(w for _, w in trail if w) or above, _paragraphs("\n".join(lines[begin:end]).split("\n\n")))


BLOCKS = frozenset(
    {"p", "li", "dt", "dd", "pre", "blockquote", "td", "th", "tr", "table", "div", "section", "article", "ul", "ol", "dl", "br",
     "hr", "body", "figcaption", "caption", "main", "details", "summary", "address"}
)  # fmt: skip
SILENT = frozenset({"script", "style", "noscript", "template", "nav", "head", "svg", "iframe", "object"})


def _html(path: Path) -> Iterator[Section]:
    from lxml import etree, html

    raw = path.read_bytes()
    try:  # by the page's own word for its encoding, where it says one
        parser = html.HTMLParser(remove_comments=True, remove_pis=True)
        page = html.document_fromstring(raw if b"charset" in raw[:2048].lower() else _decoded(path), parser=parser)
    except (etree.ParserError, ValueError) as error:
        if not raw.strip():
            return
        raise UserError(f"{path}: no HTML ({error})") from error
    title = " ".join((page.findtext(".//title") or path.stem).split())
    trail, words, paragraphs = list[tuple[int, str]](), list[str](), list[str]()

    def told() -> Section:
        paragraph()
        found = Section(tuple(w for _, w in trail) or (title,), _paragraphs(paragraphs))
        paragraphs.clear()
        return found

    def paragraph() -> None:
        paragraphs.append(" ".join("".join(words).split()))
        words.clear()

    for event, node in etree.iterwalk(page, events=("start", "end")):
        tag = node.tag if isinstance(node.tag, str) else ""
        if event == "start":
            if tag in BLOCKS:
                paragraph()
            if tag in SILENT or not tag or hidden(node):
                continue
            if heading(tag):
                yield told()
                level = int(tag[1])
                trail = [*((n, w) for n, w in trail if n < level), (level, " ".join(node.text_content().split()))]
            elif not inside(node):
                words.append(node.text or "")
        else:
            if tag in BLOCKS:
                paragraph()
            if not inside(node, itself=False):
                words.append(node.tail or "")
    yield told()


def heading(tag: str) -> bool:
    return len(tag) == 2 and tag[0] == "h" and tag[1] in "123456"


def hidden(node: Any) -> bool:
    """Whether it, or what it stands in, is never shown."""
    return any(one.tag in SILENT for one in (node, *node.iterancestors()))


def inside(node: Any, itself: bool = True) -> bool:
    """Whether a heading or something that is never shown holds the text."""
    around = (node, *node.iterancestors()) if itself else tuple(node.iterancestors())
    return any(isinstance(one.tag, str) and (one.tag in SILENT or heading(one.tag)) for one in around)


def _pdf(path: Path) -> Iterator[Section]:
    import logging

    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading PDF needs the extra: pip install 'fedtailor[rag]'") from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of whatever it mended
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path}: locked with a password; save it without one, or leave it out")
        title = (reader.metadata.title if reader.metadata else None) or path.stem
        for number, page in enumerate(reader.pages, 1):
            yield Section((str(title), f"page {number}"), _paragraphs(page.extract_text().split("\n\n")))
    except UserError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        # pypdf meets a damaged file with whatever its parser trips over
        raise UserError(f"{path}: damaged PDF ({type(error).__name__}: {error})") from error


READERS: dict[str, Callable[[Path], Iterator[Section]]] = {
    ".txt": _plain, ".text": _plain, ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf,
}  # fmt: skip


def _paragraphs(texts: list[str]) -> str:
    """Each without spaces around its lines, none of them empty, no control letters."""
    cleaned = ("\n".join(line.strip() for line in text.splitlines() if line.strip()) for text in texts)
    whole = "\n\n".join(text for text in cleaned if text)
    return "".join(letter for letter in whole if letter in "\n\t" or letter.isprintable())
