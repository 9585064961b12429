"""What of a silo's documents may leave it: the [documents] of a silo.toml, and what it lets out of a passage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedtailor.retrieval.cutting import SENTENCE
from fedtailor.retrieval.redaction import redacted, redacted_title
from fedtailor.retrieval.terms import UNSPACED, terms

Share = Literal["full", "shareable", "redacted", "snippets", "answers"]
AtLeastOne = Annotated[int, Field(ge=1)]
CUT = "…"
PIECE = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
LETTERS = 20  # of a word, at most: a text without spaces is no single word


@dataclass(frozen=True)
class Policy:
    """The [documents] of a silo.toml. It holds whatever a server asks."""

    index: str = ""  # the index file, beside silo.toml
    share: Share = "full"  # shareable: of documents marked so alone; answers: nothing of a passage
    words: AtLeastOne = 30  # of a snippet
    redact: bool = False  # whatever leaves is without names and numbers; with share = "redacted" always
    recognizer: str = ""  # "package.module:function", text -> (begin, end, kind) of what is hidden besides
    statistics: bool = True  # whether it tells in how many passages a word is
    centroids: Annotated[int, Field(ge=0)] = 16  # means of groups of vectors that it tells, for routing
    noise: Annotated[float, Field(ge=0)] = 1.0  # on them, see `routing.centroids`
    longest: AtLeastOne = 256  # tokens of an answer that its own model writes
    # Of each asker. Who asks is what the server says: one that lies has as many askers as it likes, so the limits that hold
    # against it are those over all askers together.
    questions_per_hour: AtLeastOne | None = None
    words_per_day: AtLeastOne | None = None
    questions_per_hour_all: AtLeastOne | None = None
    words_per_day_all: AtLeastOne | None = None

    def __post_init__(self) -> None:
        if self.recognizer and not self.redacts:
            raise ValueError('recognizer is set, yet nothing is redacted; set redact = true or share = "redacted" as well')

    @property
    def limited(self) -> bool:
        """Whether it is to be kept in mind who asked how much."""
        return any((self.questions_per_hour, self.words_per_day, self.questions_per_hour_all, self.words_per_day_all))

    @property
    def redacts(self) -> bool:
        return self.redact or self.share == "redacted"


def let_out(policy: Policy, text: str, weights: Mapping[int, float]) -> str:
    """What leaves of a passage's text. weights: of the question's words, as in `scoring.Question`. "" where nothing does.

    Redaction comes first: a snippet cut out of a sentence no longer shows which words begin one. With "shareable" the caller
    leaves out documents that are not. Raises UserError and SiloError as `redaction.redacted`.
    """
    if policy.share == "answers":
        return ""
    shown = redacted(text, policy.recognizer) if policy.redacts else text
    return snippet(shown, weights, policy.words) if policy.share == "snippets" else shown


def cited(policy: Policy, document: str, number: int, section: str) -> tuple[str, str]:
    """How a passage is cited: (document, headings). `number`: the document's own in the index. Raises as `let_out`.

    A file's name may hold a person's, in lower case as well, which no rule sees; two redacted ones may be the same. So where
    names are hidden, or nothing is shared, the number stands for it, which the silo's owner can look up. Headings are text of
    the document: of them leaves what does of a passage, with snippets the first words.
    """
    name = f"document {number}" if policy.redacts or policy.share == "answers" else document
    if policy.share == "answers":
        return name, ""
    shown = redacted_title(section, policy.recognizer) if policy.redacts else section
    return name, snippet(shown, {}, policy.words) if policy.share == "snippets" else shown


def counted(text: str) -> int:
    """Words, as they count in a snippet and for `words_per_day`: at most 20 letters each; a Han letter or kana is one."""
    return len(list(_words(text)))


def snippet(text: str, weights: Mapping[int, float], words: int) -> str:
    """Of the runs of at most so many words the one in which the question's words, each counted once, weigh most. Of equal ones
    the first that begins a sentence, else the first. "…" shows where there was more; it is no word.

    Of a text without spaces each two letters are a word of the question's (`terms`): such a pair counts where it begins.
    """
    found = list(_words(text))
    if len(found) <= words:
        return text
    firsts = {0, *(match.end() for match in SENTENCE.finditer(text))}
    asked = [{term for term in has if weights.get(term, 0) > 0} for *_, has in found]

    def rank(at: int) -> tuple[float, bool, int]:
        within = set[int]().union(*asked[at : at + words])
        return -sum(weights[term] for term in sorted(within)), found[at][0] not in firsts, at

    best = min(range(len(found)), key=rank)
    last = min(best + words, len(found)) - 1
    before, after = ("… " if best else ""), (" …" if last + 1 < len(found) else "")
    return f"{before}{text[found[best][0] : found[last][1]]}{after}"


def _words(text: str) -> Iterator[tuple[int, int, set[int]]]:
    """(begin, end, the words of a question that it has)."""
    for match in PIECE.finditer(text):
        begin, end = match.span()
        if match[0] == CUT:
            continue
        pair = re.match(f"[{UNSPACED}]{{2}}", text[begin : begin + 2])
        has = set(terms(pair[0] if pair else match[0]))
        for at in range(begin, end, LETTERS):
            yield at, min(at + LETTERS, end), has if at == begin else set()
