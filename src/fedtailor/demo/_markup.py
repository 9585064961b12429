"""Plain paragraphs out of the markup that manuals are written in: POD, reStructuredText, man pages and HTML.

Each function returns blocks in order: ("h2", title) for headings, by depth from 1, and ("p", paragraph).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser

Block = tuple[str, str]

# Signs of no text stand for the brackets until the codes, which have brackets too, are gone.
_POD_ENTITIES = {"lt": "\x01", "gt": "\x02", "verbar": "|", "sol": "/"}
_RST_RULES = "=-~^\"'*#+."
_TROFF_SIGNS = {"cq": "’", "aq": "'", "lq": "“", "rq": "”", "em": "—", "en": "–", "bu": "*", "co": "©", "ga": "`",
                "ha": "^", "ti": "~", "rs": "\\", "dq": '"', "oq": "‘"}
_HTML_BLOCKS = {"p", "pre", "div", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "blockquote", "hr", "br"}


def tidy(text: str, margin: bool = True) -> str:
    """Single spaces, no spaces at line ends, one empty line at most; without `margin` no spaces before lines either."""
    lines = [re.sub(r"[ \t\r\f]+", " ", line).rstrip() for line in text.split("\n")]
    lines = lines if margin else [line.lstrip() for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def pod(text: str) -> Iterator[Block]:
    for block in re.split(r"\n\s*\n", text):
        if match := re.match(r"=head(\d)\s+(.*)", block, re.DOTALL):
            yield f"h{match[1]}", tidy(_pod_inline(" ".join(match[2].split())))
        elif match := re.match(r"=item\s+(.*)", block, re.DOTALL):
            if (item := _pod_inline(" ".join(match[1].split())).lstrip("* ")):
                yield "p", f"* {item}"
        elif block[:1] in (" ", "\t"):
            yield "p", tidy(block)
        elif block.strip() and not block.startswith("="):
            yield "p", tidy(_pod_inline(" ".join(block.split())))


def _pod_inline(text: str) -> str:
    """C<printf> is printf, L<shown|target> is what is shown; codes may nest and may have doubled brackets."""
    text = re.sub(r"\b[BCFILSXZ]<<+ (.*?) >>+", lambda m: m[1].replace("<", "\x01").replace(">", "\x02"), text)
    text = re.sub(r"E<(\w+)>", lambda m: _POD_ENTITIES.get(m[1]) or _sign(m[1]), text)
    before = ""
    while before != text:
        before = text
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"X<[^<>]*>", "", text)
        text = re.sub(r"\b[BCFILSZ]<([^<>]*)>", r"\1", text)
    return text.replace("\x01", "<").replace("\x02", ">")


def _sign(name: str) -> str:
    return chr(int(name, 0)) if name[:1].isdigit() else unescape(f"&{name};")


def rst(text: str) -> Iterator[Block]:
    lines = text.split("\n")
    rules: list[str] = []
    kept: list[str] = []

    def paragraphs() -> Iterator[Block]:
        for block in re.split(r"\n\s*\n", _rst_inline("\n".join(kept))):
            if tidy(block):
                yield "p", tidy(block)
        kept.clear()

    skipped = -1
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if skipped >= 0 and (not line.strip() or indent > skipped):
            continue
        skipped = -1
        rule = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if _is_rule(line) and (not kept or not kept[-1].strip()):
            continue
        if line.strip() and not indent and _is_rule(rule) and len(rule) >= len(line.rstrip()) - 1:
            yield from paragraphs()
            if rule[0] not in rules:
                rules.append(rule[0])
            yield f"h{rules.index(rule[0]) + 1}", _rst_inline(line.strip())
        elif _is_rule(line) and number and lines[number - 1].strip():
            continue
        elif match := re.match(r"\s*\.\. (?:(code-block|note|tip|warning|seealso|versionchanged|versionadded)::.*|.*)$", line):
            # Of what a directive holds only text and code are kept; comments, targets and the rest go as a whole.
            skipped = -1 if match[1] else indent
            kept.append("")
        else:
            kept.append(re.sub(r"::\s*$", ":", line) if line.strip() != "::" else "")
    yield from paragraphs()


def _is_rule(line: str) -> bool:
    line = line.rstrip()
    return len(line) > 2 and line[0] in _RST_RULES and set(line) == {line[0]}


def _rst_inline(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``(.*?)``", r"\1", text, flags=re.DOTALL)
    return re.sub(r"`([^`]+)`_", r"\1", text)


def man(text: str) -> Iterator[Block]:
    """Also ("q", text) for a paragraph at the margin with an indented one under it: a term and its explanation."""
    words: list[str] = []
    literal = False
    depth = 0

    def paragraph(kind: str = "p") -> Iterator[Block]:
        found = ("\n" if literal else " ").join(words)
        words.clear()
        if tidy(found):
            yield kind, tidy(found)

    for line in text.split("\n"):
        macro, _, rest = line.partition(" ")
        if macro in (".SH", ".SS"):
            yield from paragraph()
            yield ("h1" if macro == ".SH" else "h2"), _troff(rest).strip('" ')
        elif macro in (".RS", ".nf"):
            yield from paragraph("q" if macro == ".RS" and not depth else "p")
            depth += macro == ".RS"
            literal = literal or macro == ".nf"
        elif macro in (".PP", ".sp", ".RE", ".fi", ".TP", ".IP"):
            if not (literal and macro == ".sp"):
                yield from paragraph()
            depth -= macro == ".RE"
            literal = literal and macro != ".fi"
        elif not line.startswith((".", "'")):
            words.append(_troff(line))
    yield from paragraph()


def _troff(text: str) -> str:
    text = re.sub(r"\\f[BIRP]|\\f\(\w\w|\\&|\\c$|\\h'[^']*'|\\[nm]\[.*?\]|\\m\[\]", "", text)
    text = re.sub(r"\\\*?\((\w\w)", lambda m: _TROFF_SIGNS.get(m[1].lower(), ""), text)
    return text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(", "").replace("\\'", "'")


class _Html(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.kind = "p"
        self.text = ""
        self.ignored = 0
        self.pre = 0

    def flush(self) -> None:
        if tidy(self.text):
            self.blocks.append((self.kind, tidy(self.text)))
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ignored += tag in ("style", "script", "title")
        if re.fullmatch(r"h[1-6]", tag):
            self.flush()
            self.kind = tag
        elif tag in _HTML_BLOCKS:
            self.flush()
            self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.ignored -= tag in ("style", "script", "title")
        if re.fullmatch(r"h[1-6]", tag):
            self.flush()
            self.kind = "p"
        elif tag in _HTML_BLOCKS:
            self.flush()
            self.pre -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self.ignored:
            self.text += data


def html(text: str) -> Iterator[Block]:
    reader = _Html()
    reader.feed(text)
    reader.close()
    reader.flush()
    yield from reader.blocks
