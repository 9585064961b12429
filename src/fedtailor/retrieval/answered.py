"""What is known of an answer while it is being written, and where it comes from: between who asks and who shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

ROUND = str.maketrans("[]\uff3b\uff3d", "()()")  # square brackets stand around sources alone


@dataclass(frozen=True)
class Source:
    """A passage that an answer may rest on."""

    silo: str
    document: str  # "" where the silo's policy names none
    section: str  # heading path, "" where there is none
    text: str  # what the silo let out; "" under "answers only"
    score: float  # 1: as good as can be

    @property
    def cited(self) -> str:
        """How an answer names it: "[silo/document#section]", parts left out where they are empty. One pair of brackets on a line,
        whatever the parts hold: else a document could be called so that it names another silo's, too."""
        document = f"/{self.document}" if self.document else ""
        section = f"#{self.section}" if self.section else ""
        return f"[{' '.join(f'{self.silo}{document}{section}'.split()).translate(ROUND)}]"


@dataclass(frozen=True)
class Answered:
    """What is known of an answer so far; each one that is yielded holds all that the one before held."""

    question: str
    text: str = ""  # written so far
    sources: tuple[Source, ...] = ()  # best first
    asked: tuple[str, ...] = ()  # silos that were asked
    spared: tuple[str, ...] = ()  # silos that the router did not ask
    missing: Mapping[str, str] = field(default_factory=dict)  # silo -> why it is not in the answer (late, down, refused)
    found: bool = True  # False: no passage answers; text then says so
    done: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)  # "retrieval", "writing"


class Answerer(Protocol):
    """Who answers over silos."""

    @property
    def silos(self) -> tuple[str, ...]: ...

    def ask(self, question: str) -> Iterator[Answered]:
        """The last one is done. Raises FedtailorError with a one-line message; closed before its end, it stops writing."""
        ...
