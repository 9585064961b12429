"""A prompt by its words: where the row's text goes, what stands for each label, public examples in front.

    Prompt("Is this review positive or negative?\\n\\n{input}\\nAnswer:", words=("No", "Yes"))

`{input}` is what the experiment's template was filled with, without the template's own words; `{prompt}` is all of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, Tag

from fedtailor.answering import Answers, encode, fresh
from fedtailor.baselines import BETWEEN
from fedtailor.core import Ask
from fedtailor.data import Row
from fedtailor.errors import SiloError
from fedtailor.models import Resident
from fedtailor.prefixes import Prefixes

SLOTS = ("{input}", "{prompt}")
LONGEST = 20_000  # letters of a template: a reply that is longer is no prompt


def _pair(given: Any) -> Any:
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(isinstance(text, str) for text in given):
        raise ValueError(f"an example is [input, answer], two texts, not {given!r:.80}; in a .jsonl file one a line")
    return given


Pair = Annotated[tuple[str, str], BeforeValidator(_pair)]


@dataclass(frozen=True)
class Prompt:
    """One candidate. Crosses the wire, so it holds public text alone."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    template: str  # with one slot: {input} or {prompt}
    words: tuple[str, ...] = ()  # what the model says for each label, in the labels' order; empty: the labels themselves
    examples: tuple[Pair, ...] = ()  # (input, answer), of a public pool

    def __post_init__(self) -> None:
        found = [slot for slot in SLOTS for _ in range(self.template.count(slot))]
        if len(found) != 1:
            has = "has no slot for the row" if not found else f"has {len(found)} slots"
            raise ValueError(f"prompt {shown(self.template)} {has}; write {{input}} once, where its text goes")
        if len(self.template) > LONGEST:
            raise ValueError(f"prompt {shown(self.template)} has {len(self.template)} letters; {LONGEST} at most")
        if len(set(self.words)) < len(self.words) or not all(word.strip() for word in self.words):
            raise ValueError(f"words {list(self.words)} must be different words, one for each label in their order")

    @property
    def slot(self) -> str:
        return SLOTS[0] if SLOTS[0] in self.template else SLOTS[1]

    @property
    def halves(self) -> tuple[str, str]:
        """The text before and after the slot."""
        before, _, after = self.template.partition(self.slot)
        return before, after

    def said(self, labels: Sequence[str]) -> dict[str, str]:
        """label -> the word that stands for it."""
        return dict(zip(labels, self.words, strict=True)) if self.words and labels else {}

    def told(self, row: Row, labels: Sequence[str] = ()) -> Row:
        """The row as it is asked, examples in front; its answer in this prompt's words."""
        said = self.said(labels)
        answer = said.get(row.answer, row.answer)
        shots = [(self._around(text, row), said.get(word, word)) for text, word in self.examples]
        if row.messages:
            turns = [{"role": role, "content": t} for pair in shots for role, t in zip(("user", "assistant"), pair, strict=True)]
            *first, last = row.messages
            last = {**last, "content": self._around(last["content"], row)}
            system = sum(turn["role"] == "system" for turn in first[:1])
            return replace(row, answer=answer, messages=(*first[:system], *turns, *first[system:], last))
        front = "".join(f"{text}{'' if text[-1:].isspace() else ' '}{word}{BETWEEN}" for text, word in shots)
        return replace(row, answer=answer, prompt=front + self._around(row.input, row), frame=(0, 0))

    def written(self, template: str, labels: Sequence[str] = ()) -> str:
        """As a person would write it down, examples and all, with {input} where the row's text goes."""
        before, after = template_frame(template)
        row = Row(before + SLOTS[0] + after, "", frame=(len(before), len(after)))
        return self.told(row, labels).prompt

    def _around(self, text: str, row: Row) -> str:
        if self.slot == SLOTS[1] and row.prompt:
            text = row.prompt[: row.frame[0]] + text + row.prompt[len(row.prompt) - row.frame[1] :]
        before, after = self.halves
        return before + text + after


# told apart by what they are: an error in a table is then told once, and not as a text that it is not
Candidate = Annotated[
    Annotated[str, Tag("tagged-text")] | Annotated[Prompt, Tag("tagged-table")],
    Discriminator(lambda given: "tagged-text" if isinstance(given, str) else "tagged-table"),
]


@dataclass(frozen=True)
class Prompted:
    """What is served: the base, asked by this prompt."""

    prompt: Prompt
    labels: tuple[str, ...] = ()

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Answers:
        return opened(models["base"], self.prompt, self.labels)


def opened(resident: Resident, prompt: Prompt, labels: Sequence[str], prefixes: Prefixes | None = None) -> Answers:
    """The base, asked by this prompt. `prefixes`: what candidates tried one after the other begin with."""
    return Answers(
        resident, fresh(resident).tuned, None, BETWEEN if prompt.examples else "", lambda row: prompt.told(row, labels),
        prompt.said(labels), prefixes,
    )  # fmt: skip


def made(candidate: str | Prompt) -> Prompt:
    """A template alone, or a prompt with all its parts. ValueError where it has no slot."""
    return Prompt(candidate) if isinstance(candidate, str) else candidate


def template_frame(template: str) -> tuple[str, str]:
    """The template's own words before its first field and after its last."""
    from fedtailor.rows import columns, filled

    if not template:
        return "", ""
    text, (before, after) = filled(template, dict.fromkeys(columns(template), ""))
    return text[:before], text[len(text) - after :]


def unfit(resident: Resident, prompt: Prompt, rows: Sequence[Row], labels: Sequence[str]) -> str | None:
    """Why not every one of these rows fits the model's context when it is asked so; None: all fit."""
    more = len(prompt.told(Row("", ""), labels).prompt.encode()) + max([0, *(len(w.encode()) for w in prompt.words)])
    # a token is at least one byte: only rows that could be too long are tokenized, and chats, for their turns
    for row in rows:
        frame = (1 + len(prompt.examples)) * len(row.prompt.encode())  # the row's own frame is around examples, too
        if row.messages or frame + len(row.answer.encode()) + more + 3 >= resident.context:
            try:
                encode(resident, [prompt.told(row, labels)], stop=True)
            except SiloError as error:
                return str(error)
    return None


def holds(prompt: Prompt, secrets: Sequence[str]) -> bool:
    """Whether any of the strings is in it, by letters and digits alone: neither case, spaces, hyphens nor letters without a
    width hide one. A secret without any is looked for as it stands."""
    exact = " ".join([prompt.template, *prompt.words, *(text for pair in prompt.examples for text in pair)])
    whole = plain(exact)
    return any(plain(secret) in whole if plain(secret) else secret in exact for secret in secrets if secret.strip())


def plain(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def shown(prompt: str | Prompt) -> str:
    """A template's beginning, on one line, for messages; of a prompt also how many examples it has."""
    text = repr(prompt if isinstance(prompt, str) else prompt.template)
    count = 0 if isinstance(prompt, str) else len(prompt.examples)
    more = f" with {count} example{'s' if count > 1 else ''}" if count else ""
    return (text if len(text) <= 60 else f"{text[:56]}...{text[0]}") + more
