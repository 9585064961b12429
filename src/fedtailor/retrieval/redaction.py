"""A text without what points at people: e-mail addresses, links, account and other numbers, names. Rather too much than too
little.

No packaged recognizer was found that needs neither a model from a hub nor a network, so these are rules on how things are
written:

- a word with a digit in it is hidden whole, and so is all that an "@" joins, each address of a page or host, a file's name too;
- runs of two or more capitalised words are names, and a capitalised word within a sentence is one: so are products, months,
  abbreviations, headings in title case, and each noun of a German text;
- not found are a lone name that begins a sentence (unless it is a name elsewhere in the text), names in lower case, names in
  scripts without capitals (Arabic, Chinese, Hebrew, Hindi, ...), numbers in words, and who is meant by what is told of them.

So it makes texts less telling; it makes nobody anonymous. Where that is not enough, give a recognizer, or share less.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from fedtailor import find
from fedtailor.errors import SiloError
from fedtailor.retrieval.terms import UNSPACED

Span = tuple[int, int, str]  # begin, end, kind
Recognizer = Callable[[str], Iterable[Span]]
KINDS = ("e-mail", "link", "account", "number", "name")

RUN = r"[^\s()\[\]<>\",;]"
LAST = r"[^\s()\[\]<>{}\",;.:!?…'’]"  # of an address: what follows is the sentence's
EMAIL = re.compile(rf"(?<!{RUN})(?:\"[^\"\n]{{1,64}}\"|{RUN}*)[ \t]?@(?:[ \t]?{RUN}*{LAST})?")
SPELT = re.compile(
    rf"(?<!{RUN}){RUN}+(?:\s*[(\[{{<]\s?at\s?[)\]}}>]\s*{RUN}*{LAST}|\s+at\s+{RUN}+\s+dot\s+{RUN}*{LAST})"
    rf"(?:\s*[(\[{{<]\s?dot\s?[)\]}}>]\s*{RUN}*{LAST})*", re.IGNORECASE,
)  # fmt: skip
LINK = re.compile(rf"(?<!\w)(?:[a-z][a-z+]*://|www\.){RUN}*{LAST}", re.IGNORECASE)
HOST = re.compile(rf"(?<![\w.-])(?:[\w-]+\.)+[^\W\d_]{{2,}}(?!\w)(?:[:/?#](?:{RUN}*{LAST})?)?")
ACCOUNT = re.compile(r"(?<!\w)[a-z]{2}0{2}(?:[ -]?[a-z0]{4}){2,7}(?:[ -]?[a-z0]{1,3})?(?!\w)", re.IGNORECASE)  # IBAN
CHUNK = re.compile(rf"[^\W{UNSPACED}]+(?:[-‐-―−.:/⁄#+,'’]{{1,2}}[^\W{UNSPACED}]+)*")
BETWEEN = re.compile(r"[\s.,:/()+*#'’‐-―−-]{1,4}")  # parts of one number

INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f'’‐-]{1,3}[^\W\d_]+)*")
ENDS = re.compile(r"[.!?…][\"'”’»)\]]*\s|[。！？]")  # a sentence
NEAR = re.compile(r"[^\w.!?…。！？]{0,3}")  # words of one name
SPEAKER = re.compile(r"I(?:['’](?:m|d|ll|ve))?")
PARTICLE = re.compile(
    "af|al|av|bin|ben|bint|da|das|de|degli|dei|del|della|den|der|des|di|do|dos|du|e|el|et|ibn|la|las|le|les|lo|los|op|ten|ter|"
    "t|van|vom|von|y|zu|zum|zur"
)
TITLE = re.compile(
    "capt|col|dipl|dipl-ing|dott|dr|dra|fr|frl|gen|herrn?|hon|hr|ing|lt|maj|mlle|mme|mr|mrs|ms|mx|messrs|pfr|prof|rev|sen|sgt|"
    "sig|sir|sr|sra|st", re.IGNORECASE,
)  # fmt: skip
INITIAL = re.compile(r"[^\W\d_]|Ch|Chr|Ph|Th|Wm")
ABBREVIATED = re.compile("approx|bzw|ca|cf|dept|etc|evtl|fig|incl|nr|resp|str|tel|vgl|vol|vs", re.IGNORECASE)  # more comes


def redacted(text: str, recognizer: str = "") -> str:
    """The text with a mark, such as [e-mail] or [name], in place of each. No digit is left in it; done again, it stays as it is.

    What is left is in Unicode's plain forms (NFKC), without letters that are not seen: these could hide an address.
    recognizer: "package.module:function", text -> iterable of (begin, end, kind), for what these rules do not see. Raises
    UserError where it cannot be imported, SiloError where it fails: then nothing leaves.
    """
    return _redacted(text, recognizer, title=False)


def redacted_title(text: str, recognizer: str = "") -> str:
    """As `redacted`, of a heading: there is no sentence that tells names from words, so each capitalised word is hidden."""
    return _redacted(text, recognizer, title=True)


def _redacted(text: str, recognizer: str, title: bool) -> str:
    plain = _plain(text)
    spans = _told(plain, recognizer) if recognizer else []
    marks = re.compile("|".join(re.escape(f"[{kind}]") for kind in {*KINDS, *(kind for *_, kind in spans)}))
    while True:  # what a mark takes away may show the next one; each time there is less beside marks
        kept = [(*match.span(), "") for match in marks.finditer(plain)]
        after = _marked(plain, [*kept, *spans, *_found(plain, title)])
        if after == plain:
            return plain
        plain, spans = after, []


def _plain(text: str) -> str:
    normal = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    seen = (letter for letter in normal if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))
    return unicodedata.normalize("NFKC", "".join(seen))


def _told(text: str, recognizer: str) -> list[Span]:
    """By the silo owner's function."""
    function: Recognizer = find.function(__name__, recognizer, "documents.recognizer", set())
    place = f"documents.recognizer = {recognizer!r}"
    try:
        spans = [(int(begin), int(end), _kind(kind)) for begin, end, kind in function(text)]
    except Exception as error:  # its message may hold the text, and this one is sent
        raise SiloError(f"{place} failed with {type(error).__name__}: nothing is told; its owner can try it") from error
    if wrong := [(begin, end) for begin, end, _ in spans if not 0 <= begin <= end <= len(text)]:
        raise SiloError(f"{place} gave {wrong[0]} of a text of {len(text)} letters: nothing is told; its owner can mend it")
    return spans


def _kind(kind: str) -> str:
    return re.sub(r"[^a-z]+", "-", str(kind).lower()[:18]).strip("-") or "hidden"


def _found(text: str, title: bool) -> Iterator[Span]:
    """The first of those that overlap goes before the others."""
    shape = "".join("0" if unicodedata.category(letter)[0] == "N" else letter for letter in text)  # each kind of digit alike
    for pattern, kind in ((EMAIL, "e-mail"), (SPELT, "e-mail"), (LINK, "link"), (HOST, "link"), (ACCOUNT, "account")):
        yield from ((*match.span(), kind) for match in pattern.finditer(shape))
    yield from _numbers(shape)
    yield from _names(shape, title)


def _numbers(shape: str) -> Iterator[Span]:
    begin = end = -1
    for match in CHUNK.finditer(shape):
        if "0" in match[0]:
            if end >= 0 and not BETWEEN.fullmatch(shape, end, match.start()):
                yield begin, end, "number"
                end = -1
            begin, end = (match.start() if end < 0 else begin), match.end()
    if end >= 0:
        yield begin, end, "number"


@dataclass(frozen=True)
class Word:
    text: str
    begin: int
    end: int
    first: bool  # of a sentence

    @property
    def title(self) -> bool:
        return bool(TITLE.fullmatch(self.text))

    @property
    def small(self) -> bool:
        return self.title or bool(PARTICLE.fullmatch(self.text))

    @property
    def capital(self) -> bool:
        return any(letter.isupper() or letter.istitle() for letter in self.text) and not SPEAKER.fullmatch(self.text)

    @property
    def stem(self) -> str:
        return re.sub(r"['’]s?$", "", self.text)


def _words(shape: str) -> list[Word]:
    found = list(WORD.finditer(shape))
    firsts = [True, *(_ended(shape, one, other) for one, other in pairwise(found))]
    return [Word(match[0], match.start(), match.end(), first) for match, first in zip(found, firsts, strict=False)]


def _ended(shape: str, one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether a sentence ends between two words."""
    between = shape[one.end() : other.start()]
    goes_on = any(kind.fullmatch(one[0]) for kind in (INITIAL, TITLE, ABBREVIATED))
    return bool(ENDS.search(between)) and not (goes_on and between.lstrip().startswith("."))


def _names(shape: str, title: bool) -> Iterator[Span]:
    alone, known = list[Word](), set[str]()
    for run in _runs(shape, _words(shape)):
        if len(run) == 1 and run[0].first and not title:
            alone.append(run[0])
        else:
            known.update(word.stem for word in run if not word.first)
            yield run[0].begin, run[-1].end, "name"
    yield from ((word.begin, word.end, "name") for word in alone if word.stem in known)


def _runs(shape: str, words: Sequence[Word]) -> Iterator[list[Word]]:
    """Capitalised words that stand together, with the titles and particles before and between them."""
    run, small = list[Word](), list[Word]()
    for before, word in zip((None, *words), words, strict=False):
        goes_on = before is not None and _near(shape, before, word) and (word.capital or word.small)
        if not goes_on and run:
            yield run
        run, small = (run, small) if goes_on else ([], [])
        if word.capital:
            run += [*small, word]
            small = []
        elif word.small:
            small.append(word)
    if run:
        yield run


def _near(shape: str, one: Word, other: Word) -> bool:
    between = shape[one.end : other.begin]
    dotted = one.title or INITIAL.fullmatch(one.text)
    return bool(NEAR.fullmatch(between.removeprefix(".") if dotted else between))


def _marked(text: str, spans: Sequence[Span]) -> str:
    """With a mark for each span, none for kind "". Where they overlap the first holds; no letter of any of them is left."""
    owner = [-1] * len(text)
    for number, (begin, end, _) in enumerate(spans):
        owner[begin:end] = (number if one < 0 else one for one in owner[begin:end])
    parts = list[str]()
    for number, places in groupby(range(len(text)), owner.__getitem__):
        run = list(places)
        kind = spans[number][2] if number >= 0 else ""
        parts.append(f"[{kind}]" if kind else text[run[0] : run[-1] + 1])
    return "".join(parts)
