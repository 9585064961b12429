"""Files of each kind, good and bad: their text under its headings."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from fedtailor.errors import UserError
from fedtailor.retrieval.reading import Section, digest, kinds, read


def told(folder: Path, name: str, content: str | bytes) -> list[tuple[str, str]]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    document = read(path, f"below/{name}")
    assert document.name == f"below/{name}"
    assert document.sha256 == digest(path)
    return [(section.name, section.text) for section in document.sections]


def test_plain_text(tmp_path: Path) -> None:
    assert told(tmp_path, "a.txt", "One.\n  Two.  \n\n\n\nThree.\x07\n") == [("a", "One.\nTwo.\n\nThree.")]
    assert told(tmp_path, "b.txt", "") == []
    assert told(tmp_path, "c.txt", " \n\n ") == []


def test_markdown_by_its_headings(tmp_path: Path) -> None:
    text = "Before.\n\n# Top\nText.\n\n## Deeper\n```\n# no heading\n```\n\n### Deepest\nx\n\n## Second\ny\n\nSetext\n======\nz\n"
    assert told(tmp_path, "guide.md", text) == [
        ("guide", "Before."),
        ("Top", "Text."),
        ("Top > Deeper", "```\n# no heading\n```"),
        ("Top > Deeper > Deepest", "x"),
        ("Top > Second", "y"),
        ("Setext", "z"),
    ]


def test_markdown_without_headings_and_of_headings_alone(tmp_path: Path) -> None:
    assert told(tmp_path, "a.md", "Plain.\n") == [("a", "Plain.")]
    assert told(tmp_path, "b.md", "") == []
    assert told(tmp_path, "c.md", "# A\n\n## B\n\n## C\ntext\n\n# Call 555-1234\n") == [
        ("A > B", "B"), ("A > C", "text"), ("Call 555-1234", "Call 555-1234")
    ]  # fmt: skip


def test_front_matter_is_text_and_may_say_the_title(tmp_path: Path) -> None:
    text = '---\ntitle: "My page"\nauthor: Ann\n---\nBegin.\n\n# A\nx\n'
    assert told(tmp_path, "a.md", text) == [("My page", 'title: "My page"\nauthor: Ann\n\nBegin.'), ("A", "x")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\x0c"])
def test_ends_of_lines_of_all_kinds(tmp_path: Path, end: str) -> None:
    text = end.join(["One", "two.", "", "# A", "first of A", "", "# B", "first of B"])
    assert told(tmp_path, "a.md", text) == [("a", "One\ntwo."), ("A", "first of A"), ("B", "first of B")]


def test_spaces_of_all_widths_part_words(tmp_path: Path) -> None:
    text = "10\u00a0000 euros, Mr.\u00a0Smith\u3000signs.\u2009So\u00ad\u202e \u0645\u06cc\u200c\u062e"
    assert told(tmp_path, "a.txt", text) == [("a", "10 000 euros, Mr. Smith signs. So \u0645\u06cc\u200c\u062e")]


def test_headings_tell_a_terminal_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, "a.md", "# \x1b[31mred\x1b]0;x\x07\ntext") == [("[31mred]0;x", "text")]


def test_html_as_it_is_found(tmp_path: Path) -> None:
    """Deep, long, of any blocks, with parts that are not shown."""
    deep = "<p>before</p>" + "<div>" * 900 + "deep" + "</div>" * 900 + "<p>after</p>"
    assert told(tmp_path, "deep.html", deep) == [("deep", "before\n\ndeep\n\nafter")]
    ((_, text),) = told(tmp_path, "long.html", f"<p>{'word ' * 2_200_000}</p><p>end</p>")
    assert text.endswith("word\n\nend")
    form = "<form><label>Name</label><select><option>a</option><option>b</option></select></form>"
    blocks = f"<header>One</header><aside>Two</aside>{form}"
    assert told(tmp_path, "blocks.html", blocks) == [("blocks", "One\n\nTwo\n\nName\n\na\n\nb")]
    hidden = '<p>seen<span hidden>no</span></p><p style="Display : none">no</p><p>a<br>b</p>'
    assert told(tmp_path, "hidden.html", hidden) == [("hidden", "seen\n\na\n\nb")]


def test_html_by_its_headings_and_without_what_is_not_shown(tmp_path: Path) -> None:
    page = (
        "<html><head><title>A page</title><style>p{}</style></head><body><p>Before <b>all</b>.</p><script>x=1</script>"
        "<h1>One <i>and</i> only</h1><p>Text<!-- hidden --> here.</p><nav>menu</nav><h2>Two</h2>"
        "<ul><li>a</li><li>b <em>c</em></li></ul><pre>code\n  kept</pre><h1>Three</h1>tail</body></html>"
    )
    assert told(tmp_path, "p.html", page) == [
        ("A page", "Before all."),
        ("One and only", "Text here."),
        ("One and only > Two", "a\n\nb c\n\ncode kept"),
        ("Three", "tail"),
    ]
    assert told(tmp_path, "empty.html", "") == []


@pytest.mark.parametrize(("page", "encoding"), [
    ('<html><head><meta charset="iso-8859-1"></head><body><p>caf\u00e9</p></body></html>', "latin-1"),
    ('<html><head><meta charset="windows-1251"></head><body><p>\u0434\u0430</p></body></html>', "cp1251"),
    ("<p>The charset of caf\u00e9</p>", "utf-8"),
    ('<meta charset="nonsense"><p>caf\u00e9</p>', "utf-8"),
    ('<meta charset="nonsense"><p>caf\u00e9</p>', "cp1252"),
    ('<?xml version="1.0" encoding="UTF-8"?><html><body><p>caf\u00e9</p></body></html>', "utf-8"),
])  # fmt: skip
def test_a_page_says_its_encoding(tmp_path: Path, page: str, encoding: str) -> None:
    ((_, text),) = told(tmp_path, "a.html", page.encode(encoding))
    assert text.split()[-1] in ("caf\u00e9", "\u0434\u0430")


@pytest.mark.parametrize("text", ["Gr\u00f6\u00dfe: 5 \u00b5m", "M\u00fcller, caf\u00e9"])
def test_a_few_western_letters_are_western(tmp_path: Path, text: str) -> None:
    assert told(tmp_path, "a.txt", text.encode("cp1252")) == [("a", text)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = "La crème brûlée est un dessert très connu, à base de crème, d'œufs et de sucre caramélisé."
    assert told(tmp_path, "a.txt", text.encode(encoding)) == [("a", text)]


def test_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt: no text in any encoding that is known; save it as UTF-8"):
        told(tmp_path, "a.txt", bytes(range(256)) * 9)


def test_pdf_by_its_pages(tmp_path: Path) -> None:
    assert told(tmp_path, "two.pdf", pdf("First page.", "Second page.")) == [
        ("two > page 1", "First page."),
        ("two > page 2", "Second page."),
    ]


@pytest.mark.parametrize("content", [b"", b"%PDF-1.4 broken", b"no PDF at all", pytest.param(None, id="cut in the middle")])
def test_a_damaged_pdf_is_told(tmp_path: Path, content: bytes | None) -> None:
    given = pdf("A page.")[:200] if content is None else content
    with pytest.raises(UserError, match=r"bad\.pdf: damaged PDF"):
        told(tmp_path, "bad.pdf", given)


def test_a_locked_pdf_is_told(tmp_path: Path) -> None:
    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(72, 72)
    writer.encrypt("secret", algorithm="RC4-128")
    with (tmp_path / "locked.pdf").open("wb") as file:
        writer.write(file)
    with pytest.raises(UserError, match="locked with a password"):
        read(tmp_path / "locked.pdf", "locked.pdf")


def test_whatever_a_parser_trips_over_is_told(tmp_path: Path) -> None:
    """Bytes of a good file changed, one at a time: text, or one kind of failure."""
    good = pdf("A page.")
    for place in range(0, len(good), 3):
        (tmp_path / "a.pdf").write_bytes(good[:place] + bytes([good[place] ^ 21]) + good[place + 1 :])
        with contextlib.suppress(UserError):
            read(tmp_path / "a.pdf", "a.pdf")
    page = good.replace(b"/Length 43", b"/Filter /None /Length 43").replace(b"/Length 38", b"/Filter /None /Length 38")
    (tmp_path / "a.pdf").write_bytes(page)
    with pytest.raises(UserError, match=r"a\.pdf: damaged PDF"):
        read(tmp_path / "a.pdf", "a.pdf")


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.mdd").write_text("x")
    with pytest.raises(UserError, match=r"no kind of document that can be read; did you mean '\.md'\?"):
        read(tmp_path / "a.mdd", "a.mdd")
    with pytest.raises(UserError, match=r"gone\.txt: No such file"):
        read(tmp_path / "gone.txt", "gone.txt")
    assert {".md", ".txt", ".html", ".pdf"} <= set(kinds())


def test_a_section_is_named_by_all_above_it() -> None:
    assert Section(("A", "B"), "x").name == "A > B"


def pdf(*pages: str) -> bytes:
    """A file with these pages, a line each, written out by hand."""
    count = len(pages)
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(count))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>"]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
        resources = f"/Resources << /Font << /F1 {font} >> >>"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * i} 0 R {resources} >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    made, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(made))
        made += f"{number} 0 obj\n{one}\nendobj\n".encode()
    begins = len(made)
    made += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    made += "".join(f"{place:010} 00000 n \n" for place in places).encode()
    return made + f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{begins}\n%%EOF\n".encode()
