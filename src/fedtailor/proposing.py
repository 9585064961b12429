"""New candidates out of those there are: written by a silo's base model, by an endpoint, or put together by the server.

The server has no model, so it asks a silo's: `write` reads none of the silo's rows, and every base is the same. An
instruction is what stands in a template above the line of the slot; the rest is its layout.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedtailor import progress
from fedtailor.answering import fresh
from fedtailor.core import Ask, Silo, in_silo
from fedtailor.data import Row
from fedtailor.endpoint import Endpoint, EndpointError, complete
from fedtailor.errors import RunError
from fedtailor.prompts import LONGEST, Prompt

Proposer = Literal["model", "cross", "examples", "endpoint"]
MOST_REQUESTS, MOST_LETTERS = 64, 600  # of one exchange; of one instruction
WRITES = 96  # tokens of an instruction at most


@dataclass(frozen=True)
class Write:
    """Down: what the base is to go on with. Made of candidates, which every silo knows."""

    requests: tuple[str, ...]
    temperature: float


@dataclass(frozen=True)
class Written:
    """Up: what the base wrote. No row was read for it."""

    texts: tuple[str, ...]

    def problem(self, asked: Write) -> str | None:
        if len(self.texts) != len(asked.requests) or not all(isinstance(text, str) for text in self.texts):
            return f"{len(self.texts)} texts, asked {len(asked.requests)}"
        longest = max(map(len, self.texts), default=0)
        return f"a text of {longest} letters" if longest > LONGEST else None


@in_silo(memory=False)
def write(silo: Silo, body: Write) -> Written:
    # no chat template: a small model goes on with a pattern better than it does what it is told
    rows = [Row(text, "") for text in body.requests[:MOST_REQUESTS]]
    model = fresh(silo.models["base"])
    return Written(tuple(model.generate(rows, max_new_tokens=WRITES, temperature=body.temperature, top_p=0.95, seed=silo.seed)))


@dataclass(frozen=True)
class Parts:
    """A template taken apart: instruction + gap + lead + slot + after."""

    instruction: str
    gap: str
    lead: str
    slot: str
    after: str

    def with_instruction(self, text: str) -> str:
        return text + (self.gap if self.instruction else "\n\n") + self.lead + self.slot + self.after if text else self.bare

    @property
    def bare(self) -> str:
        return self.lead + self.slot + self.after


def taken_apart(prompt: Prompt) -> Parts:
    before, after = prompt.halves
    head, newline, lead = before.rpartition("\n")
    instruction = head.rstrip()
    return Parts(instruction, head[len(instruction) :] + newline, lead, prompt.slot, after)


def crossed(parents: Sequence[Prompt], dice: random.Random) -> Prompt | None:
    """One's instruction in another's layout, with the words of the layout and either's examples; None: too long for a prompt."""
    one, other = dice.choice(parents), dice.choice(parents)
    template = taken_apart(other).with_instruction(taken_apart(one).instruction)
    examples = dice.choice([one.examples, other.examples])
    return Prompt(template, other.words, examples) if len(template) <= LONGEST else None


def exemplified(parent: Prompt, pool: Sequence[tuple[str, str]], most: int, dice: random.Random) -> Prompt:
    """With up to `most` public examples in front, of different answers as far as there are any."""
    answers = sorted({answer for _, answer in pool})
    dice.shuffle(answers)
    chosen: list[tuple[str, str]] = []
    for i in range(dice.randint(1, most)):
        rest = [pair for pair in pool if pair not in chosen]
        wanted = [pair for pair in rest if pair[1] == answers[i % len(answers)]] or rest
        if wanted:
            chosen.append(dice.choice(wanted))
    return replace(parent, examples=tuple(chosen))


REWORDED = (
    "Instruction: Translate the text into French.\nIn other words: Give the French translation of the following text.\n\n"
    "Instruction: Count the people in the story.\nIn other words: How many people does the story tell of?\n\n"
    "Instruction: {one}\nIn other words:"
)
JOINED = (
    "First: Name the animal in the text.\nSecond: Answer in one word.\nBoth: Name the animal in the text in one word.\n\n"
    "First: Say who wrote the letter.\nSecond: Say when it was written.\nBoth: Say who wrote the letter, and when.\n\n"
    "First: {one}\nSecond: {other}\nBoth:"
)
PRECISE = (
    "Instruction: Say what the text is about.\nMore precisely: Name the main subject of the text in at most three words.\n\n"
    "Instruction: Grade the answer.\nMore precisely: Give the answer a grade from 1, all wrong, to 5, all right.\n\n"
    "Instruction: {one}\nMore precisely:"
)


def requests(parents: Sequence[Prompt], count: int, dice: random.Random) -> list[tuple[str, Prompt]]:
    """`count` texts for a model to go on with, with the candidate in whose layout its line goes: reworded, joined, made
    more precise, in turn."""
    told = [text.replace("\n", " ") for parent in parents if (text := taken_apart(parent).instruction)]
    told = told or ["Read the text and answer the question about it."]
    kinds = (REWORDED, PRECISE, JOINED) if len(told) > 1 else (REWORDED, PRECISE)
    found = []
    for i in range(count):
        one, other = dice.choice(told), dice.choice(told)
        found.append((kinds[i % len(kinds)].format(one=one, other=other), dice.choice(parents)))
    return found


def cleaned(text: str) -> str:
    """The instruction in what a model wrote; "" where there is none."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "Here is the new instruction:"
        lines = lines[1:]
    first = re.sub(r"^[\s*#>-]*(?:(?:new |revised )?instruction\s*:)?\s*", "", (lines or [""])[0], flags=re.I)
    first = first.strip().strip("\"'`*“”").strip()
    first = first.replace("{", "(").replace("}", ")")
    sound = first.isprintable() and "\ufffd" not in first and any(c.isalpha() for c in first)
    return first if sound and 3 <= len(first) <= MOST_LETTERS else ""


def listed(text: str) -> list[str]:
    """The instructions of an endpoint's answer: one a line, without bullets and numbers; neither what it thought before, nor
    a first line that announces others. Of an answer with bullets or numbers, those lines alone."""
    text = re.sub(r"^.*</think>|<think>.*", "", text, flags=re.S | re.I)
    lines = [line for line in text.splitlines() if line.strip()]
    item = re.compile(r"^\s*(?:[-*•]\s|\d+[.)])\s*")
    announced = len(lines) > 1 and lines[0].rstrip(" *").endswith(":")
    lines = [line for line in lines if item.match(line)] or lines[announced:]
    return [found for line in lines if (found := cleaned(item.sub("", line)))]


def by_model(
    parents: Sequence[Prompt], count: int, ask: Ask, temperature: float, dice: random.Random
) -> tuple[list[Prompt], int]:
    """What a silo's base makes of the parents, and how many of its texts could not be used. Silos take turns."""
    asked = requests(parents, count, dice)
    turn = ask.round % len(ask.silos)
    for silo in (*ask.silos[turn:], *ask.silos[:turn]):
        try:
            (reply,) = ask(write, Write(tuple(text for text, _ in asked), temperature), to=[silo])
        except RunError as error:
            progress.line(f"round {ask.round}: no proposals of {silo}: {error}")
            continue
        return _laid_out([cleaned(text) for text in reply.body.texts], [layout for _, layout in asked])
    return [], count


def by_endpoint(
    endpoint: Endpoint, parents: Sequence[Prompt], labels: Sequence[str], count: int, temperature: float, dice: random.Random
) -> tuple[list[Prompt], int]:
    """What an endpoint makes of the parents. It is told the candidates in their order, and no score of any silo."""
    told = "\n".join(f"- {taken_apart(p).instruction or taken_apart(p).bare}".replace("\n", " ") for p in parents)
    aim = f" The model must answer with one of: {', '.join(labels)}." if labels else ""
    text = (
        f"These instructions were given to a language model in front of a text, the best first.{aim}\n{told}\n\n"
        f"Write {count} new instructions that may work better, one a line, without numbers or comments."
    )
    try:
        found = listed(complete(endpoint, text, temperature=temperature))[:count]
    except EndpointError as error:
        progress.line(f"endpoint skipped: {error}")
        return [], count
    made, _ = _laid_out(found, [dice.choice(parents) for _ in found])
    return made, count - len(made)


def _laid_out(texts: Sequence[str], layouts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    laid = [(layout, taken_apart(layout).with_instruction(text)) for text, layout in zip(texts, layouts, strict=True) if text]
    made = [replace(layout, template=template) for layout, template in laid if len(template) <= LONGEST]
    return made, len(texts) - len(made)
