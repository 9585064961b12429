"""Questions in, answers with their sources out: silos are asked for passages, these are ranked, a model writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedtailor.answering import Answers, fresh
from fedtailor.core import Ask
from fedtailor.data import Row
from fedtailor.errors import SiloError, UserError
from fedtailor.models import Resident
from fedtailor.retrieval import writing
from fedtailor.retrieval.answered import Answered, Source
from fedtailor.retrieval.asking import Told
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.finding import Count, Finder, Result, Ways
from fedtailor.retrieval.policy import snippet

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

QUOTED = 120  # words
WORDS = 0.3  # BM25's share from which a passage is about a question, whatever the cosine: with all words, once each, it has 0.45


@dataclass(frozen=True)
class Answering(Ways):
    """How an answer is made of what was found."""

    write: Literal["model", "quote"] = "model"  # "quote": the best passage as it stands, which a small model does not spoil
    max_new_tokens: Count = 96
    floor: Annotated[float, Field(ge=0, le=1)] = 0.3  # cosine below which a passage answers nothing, unless it has the words
    rerank: str = ""  # "likelihood" (of the question, by [model]), or a cross-encoder of sentence-transformers; "": as found
    reranked: Count = 10  # passages that are fetched to be ranked again


@dataclass(frozen=True)
class Asking:
    """A model that answers over silos: a `retrieval.answered.Answerer`."""

    how: Answering
    resident: Resident
    model: Answers | None  # in place of the resident alone
    asks: Ask | None  # None: it answers from what it knows
    told: Mapping[str, Told]
    embedders: Mapping[str, Embedder]

    @property
    def silos(self) -> tuple[str, ...]:
        return tuple(self.told)

    @cached_property
    def finder(self) -> Finder:
        assert self.asks is not None
        return Finder(self.how, self.asks, self.told, self.embedders)

    def ask(self, question: str) -> Iterator[Answered]:
        """Raises FedtailorError: of a question that is none, or where no silo answers."""
        question = checked(question)
        began = time.perf_counter()
        (result,), (kept,) = self.retrieved([question])
        now = Answered(
            question, "", tuple(kept),
            tuple(silo for silo in result.silos), tuple(silo for silo in self.told if silo not in result.silos), result.missing,
            bool(kept), seconds={"retrieval": time.perf_counter() - began},
        )  # fmt: skip
        yield now
        if not kept:
            yield replace(now, text=writing.NOTHING, done=True)
            return
        began, text = time.perf_counter(), ""
        if self.how.write == "quote":
            text = self._quote(result, now.sources)
            yield replace(now, text=f"{text} {now.sources[0].cited}", done=True)
            return
        for piece in writing.written(self.resident, question, now.sources, self.how.max_new_tokens, self.model):
            text += piece
            if writing.ENDED in text:
                break
            yield replace(now, text=writing.cited(writing.quoted(text, False), now.sources, False, self.silos))
        seconds = {**now.seconds, "writing": time.perf_counter() - began}
        yield replace(now, text=writing.cited(writing.quoted(text), now.sources, True, self.silos), done=True, seconds=seconds)

    def retrieved(self, questions: Sequence[str]) -> tuple[list[Result], list[list[Source]]]:
        """Of each question what was found, and what an answer is made of, the best first: passages, and what silos that keep
        theirs say by themselves."""
        results = self.finder.find(questions)
        for result in results:
            result.found = [one for one in result.found if one.cosine >= self.how.floor or one.words >= WORDS]
        most = self.how.reranked if self.how.rerank else self.how.passages
        found = list[list[Source]]()
        for question, result, sources in zip(questions, results, self.finder.sources(results, most), strict=True):
            every = [*sources, *self.finder.said(result, question, most, self.how.max_new_tokens)]
            ranked = self._ranked(question, every) if self.how.rerank else sorted(every, key=lambda one: -one.score)
            found.append(ranked[: self.how.passages])
        return results, found

    def answers(self, questions: Sequence[str], found: Sequence[tuple[Result, Sequence[Source]]] = ()) -> list[str]:
        """Without citations. Without `found`, from what the model knows."""
        model = self.model or fresh(self.resident)
        sources: list[Sequence[Source]] = [()] * len(questions)
        if found:
            sources = [some for _, some in found]
        if found and self.how.write == "quote":
            return [self._quote(result, some) for (result, _), some in zip(found, sources, strict=True)]
        most = self.how.max_new_tokens
        rows = [
            writing.row(self.resident, question, some, most, model.tuned.shift)
            for question, some in zip(questions, sources, strict=True)
        ]
        if not found:
            return model.generate(rows, max_new_tokens=most)
        asked = [row for row, some in zip(rows, sources, strict=True) if some]
        texts = iter(model.generate(asked, max_new_tokens=most, begin=writing.LEAD))
        return [writing.quoted(next(texts)) if some else writing.NOTHING for some in sources]

    def generate(self, rows: Sequence[Row], *, max_new_tokens: int = 0) -> list[str]:
        """As any model that answers: each row's prompt is a question."""
        questions = [question_of(row) for row in rows]
        if self.asks is None:
            return self.answers(questions)
        results, sources = self.retrieved(questions)
        return self.answers(questions, list(zip(results, sources, strict=True)))

    def _quote(self, result: Result, sources: Sequence[Source]) -> str:
        """Of the best passage as much as `QUOTED` words, where the question's are."""
        if not sources:
            return writing.NOTHING
        return writing.plain(snippet(sources[0].text, result.asked.weights, QUOTED), self.silos)

    def _ranked(self, question: str, sources: Sequence[Source]) -> list[Source]:
        if self.how.rerank == "likelihood":
            scores = writing.likelihood(self.resident, question, sources)
        else:
            scores = self._cross.predict([(question, one.text) for one in sources]).tolist() if sources else []
        order = sorted(range(len(sources)), key=lambda i: (-scores[i], i))
        return [sources[i] for i in order]

    @cached_property
    def _cross(self) -> CrossEncoder:
        from sentence_transformers import CrossEncoder

        try:
            made: CrossEncoder = CrossEncoder(self.how.rerank)
            return made
        except (OSError, ValueError) as error:
            told = str(error).splitlines()[0]
            why = f"neither 'likelihood' nor a cross-encoder that can be loaded ({told})"
            raise UserError(f"[method] rerank = {self.how.rerank!r}: {why}") from error


def question_of(row: Row) -> str:
    """Of a chat, the last turn."""
    return row.messages[-1]["content"] if row.messages else row.input


def checked(question: str) -> str:
    """On one line. Raises SiloError where there is nothing to ask, or too much."""
    text = " ".join(question.split())
    if not text:
        raise SiloError("nothing to ask: write a question")
    if len(text) > 2000:
        raise SiloError(f"a question of {len(text)} letters; 2,000 at most")
    return text
