"""Files of each kind, good and bad: their text under its headings."""

from __future__ import annotations

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


def test_a_page_says_its_encoding(tmp_path: Path) -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body><p>caf\u00e9</p></body></html>'
    assert told(tmp_path, "latin.html", page.encode("latin-1")) == [("latin", "caf\u00e9")]


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
