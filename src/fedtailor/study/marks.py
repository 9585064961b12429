"""Sheets -> SVG and PNG: the looks, sizes and small things that all charts of a study share. Needs matplotlib.

Colour never stands alone: looks differ in marker, fill and dash as well, so that a chart reads in black and white. The
colours are those of Okabe and Ito (Color Universal Design, 2008), the light ones darkened to 3:1 on white. Text stays
text in the SVG: it can be selected and weighs little. It is laid out in DejaVu Sans, as wide as the widest of the usual
fonts, so where another takes its place nothing comes to overlap.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from fedtailor.errors import UserError
from fedtailor.figures import clean, duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.transforms import Bbox

WIDE, NARROW = 7.0, 3.5  # inches: the text of an A4 page; one column of a paper, or a phone (336 CSS pixels)
SMALL = 9.0  # points; nothing is set smaller
FONTS = "font-family:'DejaVu Sans',Verdana,Arial,sans-serif"
CLOSE = 16  # of the places that are tried for a name: those near its point
INK, RULE, SOFT = "#1b2026", "#d5dae0", "#59636e"


@dataclass(frozen=True)
class Look:
    """How a line and its marks are drawn."""

    colour: str
    marker: str
    dash: Any = "-"
    filled: bool = True

    def line(self, **more: Any) -> dict[str, Any]:
        """What Axes.plot takes of it."""
        face = self.colour if self.filled else "white"
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash, "linewidth": 1.5, "markersize": 5.5,
                "markerfacecolor": face, "markeredgecolor": self.colour, "markeredgewidth": 1.2, **more}


LOOKS = (
    Look("#0072b2", "o"),
    Look("#d55e00", "s", (0, (5, 2)), filled=False),
    Look("#00895f", "^", (0, (1.5, 1.5))),
    Look("#b0568c", "D", (0, (6, 2, 1.5, 2)), filled=False),
    Look("#1b2026", "v", (0, (9, 2))),
    Look("#b77f00", "P", (0, (3, 1.5, 1, 1.5, 1, 1.5)), filled=False),
    Look("#3a93c8", "X", (0, (2.5, 2.5))),
    Look("#6b5b00", ">", (0, (8, 2, 3, 2)), filled=False),
)  # no more lines than these share a panel
ROW_LOOKS = {  # the colours of report.html
    "zero_shot": Look("#6b7480", "x"), "few_shot": Look("#b0568c", "D", filled=False),
    "alone": Look("#00895f", "^", (0, (1.5, 1.5)), filled=False), "alone.own": Look("#00895f", "v"),
    "federated": Look("#0072b2", "o"), "centralized": Look("#d55e00", "s", (0, (5, 2)), filled=False),
}  # fmt: skip


def looks_of(rows: Sequence[str]) -> dict[str, Look]:
    """A look for each row: its own where it has one, else in turn those that no row has."""
    free = [look for look in LOOKS if look.colour not in {own.colour for own in ROW_LOOKS.values()}]
    others = [row for row in rows if row not in ROW_LOOKS]
    return {row: ROW_LOOKS.get(row) or free[others.index(row) % len(free)] for row in rows}


@contextlib.contextmanager
def style(salt: str) -> Iterator[None]:
    """Matplotlib's settings for what is drawn within; those of the process come back afterwards.

    The same figures and `salt` give the same bytes. Raises UserError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("report of a study: plots need fedtailor[study]: pip install 'fedtailor[study]'") from None
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "text.usetex": False,
        "axes.formatter.use_mathtext": False, "axes.unicode_minus": True, "axes.formatter.useoffset": False,
        "font.family": ["DejaVu Sans"],
        "font.size": SMALL, "axes.labelsize": SMALL, "axes.titlesize": SMALL, "axes.titleweight": "bold",
        "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "figure.labelsize": SMALL,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.8, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7,
        "figure.facecolor": "white", "axes.facecolor": "white", "legend.frameon": False, "path.simplify": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A letter that DejaVu has not is drawn as a box in the PNG, and by the reader's own font in the SVG.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|Matplotlib currently does not support .* natively")
        yield


def figure(width: float, height: float) -> Figure:
    """An empty sheet of that many inches, drawn by Agg: no window, nothing kept by pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sheet = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    FigureCanvasAgg(sheet)
    return sheet


def as_svg(sheet: Figure, title: str, alt: str, caption: str, salt: str) -> str:
    """One <svg> element that may stand beside others in a page: no id of another's, no rule for what is around it."""
    file = io.StringIO()
    sheet.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    own = "c" + hashlib.sha256(salt.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}", text)
    # What says nothing: turns by 0, the one font again and again, decimals below a hundredth of a point.
    text = re.sub(r' transform="rotate\(-?0 [^"]*"|(?<=; )font-family: [^;"]*; ', "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text).replace("\n</text>", "</text>").replace("<defs>\n</defs>\n", "")
    head, _, body = text.partition(">")
    told = f' role="img" aria-label="{escape(clean(alt))}" style="stroke-linejoin:round;stroke-linecap:butt;{FONTS}"'
    named = f"<title>{escape(clean(title))}</title><desc>{escape(clean(caption))}</desc>"
    return f"{head}{told}>{named}{body}".strip() + "\n"


def as_png(sheet: Figure, title: str, alt: str) -> bytes:
    """At 200 dots per inch."""
    file = io.BytesIO()
    told = {"Title": title, "Description": alt, "Software": None}
    sheet.savefig(file, format="png", dpi=200, metadata=told)
    return file.getvalue()


def plain(value: Any, most: int = 60) -> str:
    """A value of the data as one short line."""
    text = " ".join(clean(value).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def wrapped(value: Any, width: int, lines: int = 3) -> str:
    """In lines of `width` letters at most: broken at spaces, behind _ and /, and within words that are longer."""
    told = [""]
    for piece in re.findall(r"\s*[^\s_/]+[_/]*|\s*[_/]+", plain(value, 400)):
        if told[-1] and len(told[-1] + piece) > width:
            told.append(piece.lstrip())
        else:
            told[-1] += piece
        while len(told[-1]) > width:
            told[-1:] = [told[-1][:width], told[-1][width:]]
    return "\n".join(told if len(told) <= lines else [*told[: lines - 1], told[lines - 1][: width - 1].rstrip() + "…"])


def legend(sheet: Figure, looks: Sequence[tuple[str, Look]], lines: bool = True) -> Legend:
    """Above the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    letters = int(sheet.get_figwidth() * 11)
    handles = [Line2D([], [], **look.line(linestyle=look.dash if lines else "none"), label=plain(name, letters - 8))
               for name, look in looks]  # fmt: skip
    best: Legend | None = None
    for columns in range(min(len(handles), 6), 0, -1):
        best = sheet.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=3.4 if lines else 1.2,
                            columnspacing=1.4, borderaxespad=0.1, labelspacing=0.35)  # fmt: skip
        if columns == 1 or best.get_window_extent().width <= sheet.bbox.width * 0.98:
            break
        best.remove()
    assert best is not None, "a legend of nothing"
    return best


def scaled(axes: Axes, values: Sequence[float], unit: str) -> None:
    """A logarithmic x axis of bytes or seconds, whose ticks are round and named with their unit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    low, high = low / 1.35, high * 1.35
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    places = _seconds() if unit == "seconds" else _decades(math.log10(high / low))
    inside = [place for place in places if low <= place <= high]
    inside = inside if len(inside) > 1 else sorted({min(values), max(values)})
    axes.xaxis.set_major_locator(FixedLocator(inside[:: math.ceil(len(inside) / 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    show = size if unit == "bytes" else duration
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0\b", "", show(float(value)))))


def _decades(span: float) -> list[float]:
    """Round numbers from 1 to 10^15, as many in each decade as a span of so many decades allows."""
    steps = (1, 2, 5) if span < 2.2 else (1, 3) if span < 3.2 else (1,)
    return [step * 10.0**power for power in range(16) for step in steps]


def _seconds() -> list[float]:
    minute, hour = 60.0, 3600.0
    return [0.01, 0.1, 0.3, 1, 2, 5, 10, 20, minute / 2, minute, 2 * minute, 5 * minute, 10 * minute, 20 * minute, 40 * minute,
            *(hours * hour for hours in (2, 5, 10, 24, 48, 100, 200, 500, 1000))]  # fmt: skip


def clear(axes: Axes, which: str) -> None:
    """Takes out tick labels that would touch their neighbours; the first and the last stay."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    boxes = [(label, label.get_window_extent()) for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
    kept: list[Any] = []
    for place, (label, box) in enumerate(boxes):
        room = box.padded(3)
        if any(room.overlaps(other) for _, other in kept):
            if place == len(boxes) - 1 and len(kept) > 1:
                kept.pop()[0].set_visible(False)
            else:
                label.set_visible(False)
                continue
        kept.append((label, box))


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float, str, bool]], taken: Sequence[Bbox],
    ways: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> list[str]:
    """Write each point's name beside it where nothing else is: (x, y, name or "", bold). Returns names that found no place.

    `taken` are boxes on paper, `ways` straight lines between points of the data, which are left free where that is possible.
    """
    from matplotlib.transforms import Bbox

    dpi, frame = axes.figure.dpi, axes.get_window_extent()
    dot = 5.0 * dpi / 72
    spots = [axes.transData.transform((x, y)) for x, y, *_ in points]
    full = [*taken, *(Bbox.from_bounds(x - dot, y - dot, 2 * dot, 2 * dot) for x, y in spots)]
    lines = [Bbox(axes.transData.transform(way)) for way in ways]
    thin = [Bbox.from_extents(b.xmin - 1, b.ymin - 1, b.xmax + 1, b.ymax + 1) for b in lines]
    left: list[str] = []
    for (x, y), (at_x, at_y, name, bold) in zip(spots, points, strict=True):
        if not name:
            continue
        label = axes.annotate(wrapped(name, 22), (at_x, at_y), (0, 0), textcoords="offset points", va="bottom",
                              fontweight="bold" if bold else "normal")  # fmt: skip
        box = label.get_window_extent()
        tried = [(Bbox.from_bounds(x + dx, y + dy, box.width, box.height), dx, dy)
                 for dx, dy in _offsets(dot * 1.5, box.width, box.height)]  # fmt: skip
        inside = [one for one in tried if frame.x0 <= one[0].x0 and one[0].x1 <= frame.x1
                  and frame.y0 <= one[0].y0 and one[0].y1 <= frame.y1]  # fmt: skip
        apart = [one for one in inside if not any(one[0].padded(1.5).overlaps(other) for other in full)]
        if not apart:
            label.remove()
            left.append(name)
            continue
        near = [one for one in apart if one in tried[:CLOSE]]  # a line through a name is better than a name far away
        place, dx, dy = next((one for one in near if not any(one[0].overlaps(way) for way in thin)), apart[0])
        label.set_position((dx * 72 / dpi, dy * 72 / dpi))  # in points beside its point: the same at any resolution
        full.append(place)
    return left


def _offsets(gap: float, width: float, height: float) -> Iterator[tuple[float, float]]:
    """From a point to the lower left corner of its label: around it, and ever farther away."""
    for far in (1.0, 1.8, 2.8, 4.0):
        out = gap * far
        yield from ((out, -height / 2), (-out - width, -height / 2), (-width / 2, out), (-width / 2, -out - height),
                    (out * 0.7, out * 0.7), (-out * 0.7 - width, out * 0.7), (out * 0.7, -out * 0.7 - height),
                    (-out * 0.7 - width, -out * 0.7 - height))  # fmt: skip
