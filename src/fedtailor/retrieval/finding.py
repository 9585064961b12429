"""The asker's side of a search: which silos to ask, one list of what they found, and the passages of the winners.

    results = Finder(how, ask, told, embedders).find(["who signs a discharge?"])
    sources = finder.sources(results, 5)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from fedtailor.core import Ask
from fedtailor.errors import RunError
from fedtailor.retrieval import asking, routing, scoring
from fedtailor.retrieval.answered import Source
from fedtailor.retrieval.asking import Fetch, Say, Search, Told
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.scoring import Found, Question, Statistics
from fedtailor.retrieval.terms import terms

Count = Annotated[int, Field(ge=1)]
WRITING, LEAST = 6, 0.5  # deadlines that a silo has to answer by itself; seconds that each has to send passages
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Ways:
    """How silos are asked for passages."""

    passages: Count = 5  # that an answer is made from
    candidates: Count = 20  # of a silo, by angle, and as many by words
    words_share: Share = 0.3  # of BM25 in the score
    search: Literal["exact", "approximate"] = "exact"  # "approximate": a silo of many passages looks at few of them by angle
    merge: Literal["scores", "ranks"] = "scores"  # "ranks": reciprocal rank fusion, where silos embed by models of their own
    route: Annotated[int, Field(ge=0)] = 0  # silos asked at most; 0: all
    margin: Annotated[float, Field(ge=0)] = 0.35  # of `routing.promises`: a silo so far below the best is not asked
    deadline: Annotated[float, Field(gt=0)] = 10.0  # seconds for scores, and as many for passages; who is later is named
    asker: str = "server"  # whose limits at the silos a question counts against


@dataclass
class Result:
    """What was found for one question."""

    asked: Question
    silos: tuple[str, ...]  # that were asked
    found: list[Found]  # best first
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class Finder:
    how: Ways
    ask: Ask
    told: Mapping[str, Told]  # by silo
    embedders: Mapping[str, Embedder]  # by SHA-256

    def __post_init__(self) -> None:
        statistics = {silo: told.statistics for silo, told in self.told.items()}
        self.known = sum(statistics.values(), Statistics(0, 0, {}))
        self.routes = {silo: routing.Known(statistics[silo], told.centroids.numpy()) for silo, told in self.told.items()}

    def find(self, questions: Sequence[str]) -> list[Result]:
        """Raises RunError where no silo answered at all."""
        share = self.how.words_share
        vectors = {sha: model.questions(questions) for sha, model in self.embedders.items()}
        asked = {
            sha: [scoring.question(text, one, self.known, share) for text, one in zip(questions, some, strict=True)]
            for sha, some in vectors.items()
        }
        first = next(iter(asked.values()))
        results = [Result(one, self._chosen(i, asked), []) for i, one in enumerate(first)]
        lists = [list[list[Found]]() for _ in questions]
        heard, why = set[str](), list[str]()
        for silos, numbers in self._together(results):
            for silo, found in self._searched(silos, [asked[self.told[silos[0]].sha256][i] for i in numbers], why):
                heard.add(silo)
                for i, some in zip(numbers, found, strict=True):
                    lists[i].append(some)
        for result, each in zip(results, lists, strict=True):
            result.missing = {silo: self._late for silo in result.silos if silo not in heard}
            combine = scoring.united if self.how.merge == "scores" else scoring.fused
            result.found = combine(each, self.how.candidates)
        if results and not heard:
            raise RunError(f"no silo answered: {'; '.join(why[:3])}")
        return results

    def sources(self, results: Sequence[Result], most: int, texts: bool = True) -> list[list[Source]]:
        """The best passages of each question, as far as silos let them out. Where a silo is lost meanwhile, or a passage is
        gone, the next best takes its place.

        Silos that keep their passages are left out: `said` is for them.
        """
        held: dict[tuple[int, str, int], Source | None] = {}
        lost, end = set[str](), time.monotonic() + self.how.deadline
        while True:
            gone = {key for key, source in held.items() if source is None}
            best = [
                self._best(result, most, lost, {(silo, at) for n, silo, at in gone if n == i}) for i, result in enumerate(results)
            ]
            wanted = defaultdict[str, list[tuple[int, Found]]](list)
            for i, some in enumerate(best):
                for one in some:
                    if not self.told[one.silo].keeps and (i, one.silo, one.at) not in held:
                        wanted[one.silo].append((i, one))
            if not wanted:
                break
            for count, (silo, winners) in enumerate(wanted.items()):
                # one after the other, each with its share of what time is left: one that is slow takes no other's
                share = (end - time.monotonic()) / (len(wanted) - count)
                fetched = self._fetched(silo, winners, results, texts, time.monotonic() + max(share, LEAST))
                if fetched is None:
                    lost.add(silo)
                    for result in results:
                        if silo in result.silos:
                            result.missing.setdefault(silo, self._late)
                held |= fetched or {}
        return [
            [source for one in some if (source := held.get((i, one.silo, one.at))) is not None] for i, some in enumerate(best)
        ]

    def said(self, result: Result, question: str, most: int, max_new_tokens: int) -> Iterator[Source]:
        """What silos that keep their passages answer by themselves, where theirs are among the best."""
        keeping = dict[str, list[Found]]()
        for one in self._best(result, most):
            if self.told[one.silo].keeps:
                keeping.setdefault(one.silo, []).append(one)
        for silo, some in keeping.items():
            at = torch.tensor([one.at for one in some], dtype=torch.int64)
            try:
                # a model writes there, which takes longer than looking something up
                body, seconds = Say(self.how.asker, question, at, max_new_tokens), WRITING * self.how.deadline
                for reply in self.ask(asking.say, body, to=[silo], deadline=seconds):
                    if reply.body.text:
                        yield Source(silo, "", "", reply.body.text, some[0].score)
            except RunError:
                result.missing[silo] = self._late

    @property
    def _late(self) -> str:
        return f"no reply that could be used within {self.how.deadline:g} s"

    def _best(
        self, result: Result, most: int, lost: Collection[str] = (), gone: Collection[tuple[str, int]] = ()
    ) -> list[Found]:
        return [one for one in result.found if one.silo not in lost and (one.silo, one.at) not in gone][:most]

    def _chosen(self, i: int, asked: Mapping[str, Sequence[Question]]) -> tuple[str, ...]:
        if not self.how.route:
            return tuple(self.told)
        told = dict[str, float]()
        for sha256, some in asked.items():
            mine = routing.promises(some[i], self.routes)
            told |= {silo: mine[silo] for silo, one in self.told.items() if one.sha256 == sha256}
        return routing.chosen({silo: told[silo] for silo in self.told}, self.how.route, self.how.margin)

    def _together(self, results: Sequence[Result]) -> Iterator[tuple[list[str], list[int]]]:
        """Silos that are asked the same questions in the same vectors, and which: each sees its own questions alone."""
        numbers = {silo: tuple(i for i, result in enumerate(results) if silo in result.silos) for silo in self.told}
        groups = defaultdict[tuple[str, tuple[int, ...]], list[str]](list)
        for silo, some in numbers.items():
            if some:
                groups[self.told[silo].sha256, some].append(silo)
        return ((silos, list(some)) for (_, some), silos in groups.items())

    def _searched(
        self, silos: Sequence[str], asked: Sequence[Question], why: list[str]
    ) -> Iterator[tuple[str, list[list[Found]]]]:
        """Of each silo that answers; where none does, `why` says it."""
        vectors = torch.from_numpy(np.stack([one.vector for one in asked]))
        words = asking.words([one.weights for one in asked])
        how, share = self.how, self.how.words_share
        sha256, mean = self.told[silos[0]].sha256, asked[0].mean_words
        body = Search(how.asker, sha256, vectors, words, mean, share, how.candidates, how.search == "approximate")
        try:
            for reply in self.ask(asking.search, body, to=silos, deadline=how.deadline):
                yield reply.silo, reply.body.found(reply.silo, share)
        except RunError as error:
            why.append(str(error))

    def _fetched(
        self, silo: str, some: Sequence[tuple[int, Found]], results: Sequence[Result], texts: bool, end: float
    ) -> dict[tuple[int, str, int], Source | None] | None:
        """None where the silo does not answer until `end`."""
        found: dict[tuple[int, str, int], Source | None] = {}
        for begin in range(0, len(some), asking.MOST):
            part = self._part(silo, some[begin : begin + asking.MOST], results, texts, end - time.monotonic())
            if part is None:
                return None
            found |= part
        return found

    def _part(
        self, silo: str, some: Sequence[tuple[int, Found]], results: Sequence[Result], texts: bool, seconds: float
    ) -> dict[tuple[int, str, int], Source | None] | None:
        if seconds <= 0:
            return None
        numbers = sorted({i for i, _ in some})
        weights = asking.words([results[i].asked.weights for i in numbers] if texts else [])
        questions = torch.tensor([numbers.index(i) if texts else 0 for i, _ in some], dtype=torch.int32)
        at = torch.tensor([one.at for _, one in some], dtype=torch.int64)
        try:
            body = Fetch(self.how.asker, at, weights, questions, texts)
            (reply,) = self.ask(asking.fetch, body, to=[silo], deadline=seconds)
        except RunError:
            return None
        told = zip(some, reply.body.documents, reply.body.sections, reply.body.texts, strict=True)
        return {  # where no word comes, another passage takes its place
            (i, silo, one.at): Source(silo, document, section, text, one.score) if terms(text if texts else document) else None
            for (i, one), document, section, text in told
        }
