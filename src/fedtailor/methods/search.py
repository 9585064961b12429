"""Discrete prompt search: a pool of prompts, tried on rows that stay where they are, a bandit to spend few calls on poor ones.

Each round proposes (see `proposing`), screens by a bandit (see `bandits`), and tries the last few on the same further
rows. What leaves a silo is `trying.Tried`: sums of scores and counts; and, of a base without rows, texts it wrote.
Bandits over federated prompts: FedPOB (arXiv 2509.24701); a model as the one who proposes: APE (Zhou et al. 2023).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedtailor import bandits, limits, privacy, progress, proposing, searching, tally
from fedtailor.core import Ask, Method, Silo, in_silo
from fedtailor.endpoint import Endpoint
from fedtailor.errors import RunError, UserError, suggest
from fedtailor.methods import targets
from fedtailor.models import Resident
from fedtailor.printing import write_prompt
from fedtailor.privacy import Noise
from fedtailor.prompts import Candidate, Pair, Prompt, Prompted, holds, made, shown, unfit
from fedtailor.proposing import Proposer
from fedtailor.searching import State as State
from fedtailor.tally import Tally
from fedtailor.trying import Score, Tried, Try

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
GENERAL = (
    "{prompt}",
    "Read the text and give the right answer.\n\n{prompt}",
    "Answer in as few words as you can.\n\n{prompt}",
    "You are an expert who answers with care.\n\n{prompt}",
)
CONFIRMING = 0.25  # of a round's calls, for the last few
FINALISTS = 3


@dataclass(frozen=True)
class Look:
    """Down, once, to one silo: the prompts that a run begins with."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Looked:
    """Up: what every silo of the federation would say. No row is read."""

    labels: tuple[str, ...]
    order: int  # from the experiment's seed: shuffles each silo's rows
    misfits: tuple[int, ...]  # prompts that leave no room in the model's context, or whose words are not one for each label

    def problem(self, asked: Look) -> str | None:
        return None if all(0 <= i < len(asked.prompts) for i in self.misfits) else "misfits that were not asked about"


@dataclass(frozen=True)
class Search(Method[State]):
    """Finds a prompt. Model calls (rows scored under one prompt) of a silo and round: at most about `calls`."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    PER_SILO: ClassVar[frozenset[str]] = frozenset({"minimum", "epsilon"})
    FILES: ClassVar[tuple[str, ...]] = ("prompts", "examples")  # may be named by a .jsonl file, a value a line

    BESIDES: ClassVar[str] = (
        "These figures are of one exchange that is about every prompt; a round has several, under ucb some twenty of two "
        "candidates each. Besides: from one silo, each round, texts that its base wrote without its rows; at evaluation and "
        "comparison: sums and counts. No rows or answers leave."
    )

    prompts: tuple[Candidate, ...] = GENERAL
    """Templates with {input} or {prompt}, or tables of template, words and examples."""
    examples: tuple[Pair, ...] = ()  # (input, answer) for few-shot prompts: public ones, they go to every silo
    shots: Count = 3  # examples in one prompt at most
    calls: Count = 256
    bandit: str = "ucb"
    keep: Count = 4  # candidates that go on to the next round
    proposals: Annotated[int, Field(ge=0)] = 4  # new candidates a round
    proposers: tuple[Proposer, ...] = ("model", "cross", "examples")
    temperature: Annotated[float, Field(ge=0)] = 0.8  # of the model that proposes
    endpoint: Endpoint | None = None  # an OpenAI-compatible server that proposes, too
    score: Score = "probability"
    minimum: Count = 1  # rows in a sum that leaves a silo
    noise: privacy.Kind = "none"
    epsilon: Positive = 8.0  # what noise keeps the whole search within, for each training row
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # of Gaussian noise
    noise_seed: Literal["system", "experiment"] = "system"  # "experiment" can be repeated, and be taken off by the server
    secrets: str = ""  # a file with a string a line: no candidate that holds one leaves the server

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is empty; write at least one template with {input}, or leave it out for general ones")
        given = [made(prompt) for prompt in self.prompts]
        if twice := next((p for i, p in enumerate(given) if p in given[:i]), None):
            raise ValueError(f"prompts holds {shown(twice)} twice; remove one")
        least = math.ceil(self.minimum * (len(given) + self.proposals) / (1 - CONFIRMING))
        if self.calls < least and self.bandit != "exhaustive":
            raise ValueError(f"calls = {self.calls} is too few to try every prompt once a round; set {least} at least")
        if self.bandit not in bandits.names() and ":" not in self.bandit:
            raise ValueError(f"bandit = {self.bandit!r}: no such function{suggest(self.bandit, bandits.names())}")
        if "endpoint" in self.proposers and self.endpoint is None:
            raise ValueError("proposers names endpoint: set [method.endpoint] url and model, or leave it out")

    def ready(self, resident: Resident, silos: Mapping[str, Any]) -> None:
        """Raises UserError for whatever can be known to fail before a model is called."""
        targets.claimed(self, resident)
        if self.endpoint is not None:
            self.endpoint.check()
        labels = next((rows.labels for rows in silos.values() if rows.labels), ())
        self._within_limits(silos)
        self._clean()
        self._answers(labels)
        for prompt in map(made, self.prompts):
            if why := _misfit(resident, prompt, labels):
                raise UserError(f"[method] prompts: {shown(prompt)}: {why}")
            for name, rows in silos.items():
                if told := unfit(resident, prompt, (*rows.train, *rows.val, *rows.test), rows.labels):
                    raise UserError(f"[method] prompts: {shown(prompt)}, silo {name!r}: {told}; shorten it")

    def unaffordable(self, silos: Mapping[str, Any], rounds: int) -> list[str]:
        """Limits of silos that are below what a single sum costs, each with what to do."""
        cost = 0.0 if self.noise == "none" else self._noise(rounds).spent(1)
        return [
            f"[silo.{name}] epsilon = {most:g}: one sum costs {cost:.3g} already; raise it, or lower [method] epsilon"
            for name, rows in silos.items()
            if (most := limits.of(rows).epsilon) < cost
        ]

    def begin(self, ask: Ask) -> State:
        self._clean()
        pool, why = tuple(map(made, self.prompts)), []
        for name in ask.silos:
            try:
                (reply,) = ask(look, Look(pool), to=[name])
                break
            except RunError as error:  # this silo cannot: the next
                why.append(str(error))
        else:
            raise RunError(f"no silo could look at the prompts; {'; '.join(why[:3])}")
        if reply.body.misfits:
            first = pool[reply.body.misfits[0]]
            raise UserError(f"[method] prompts: {shown(first)}: too long for the model, or not one word a label")
        known = tally.empty(len(ask.silos), self._noise(ask.rounds).variance).grown(len(pool))
        places = tuple(range(len(pool)))
        notes = {"calls": 0.0, "model_calls": 0.0, "candidates": float(len(pool))}
        return State(
            pool, ("hand",) * len(pool), known, places, 0, ask.silos, reply.body.labels, reply.body.order, notes=notes
        )

    def round(self, state: State, ask: Ask) -> State:
        state = searching.begun(self._proposed(state, ask), ask)
        running, screening, how = state.running, round(self.calls * (1 - CONFIRMING)), bandits.find(self.bandit)
        form = Try((), (), state.order, self.score, self.minimum, self._noise(ask.rounds), self.noise_seed == "experiment")
        # what a silo says nothing below is no step, as far as the calls allow it for all
        floors = [floor for name in ask.silos if (floor := state.floor(name)) * len(running) <= screening]
        least = max([self.minimum, *floors])
        with progress.bar("model calls a silo", self.calls) as advance:

            def attempt(wants: Mapping[int, int]) -> Tally:
                nonlocal state
                done = bandits.spent(state.known)
                state = searching.tried(state, wants, ask, form, self.calls - done)
                for _ in range(min(bandits.spent(state.known) - done, self.calls)):
                    advance()
                return state.known

            order = how(state.known, running, screening, least, attempt)
            order = [c for c in order if c in state.running]  # without those that did not fit
            finalists, left = order[:FINALISTS], self.calls - bandits.spent(state.known)
            bandits.confirm(state.known, finalists, left, least, attempt)
        if not bandits.spent(state.known) and not all(state.known.over[list(running)]):
            raise RunError(self._silent(state, ask))
        best = state.known.best(finalists)
        running = (best, *[c for c in order if c != best][: self.keep - 1])
        state = replace(state, best=best, running=running, notes=self._noted(state, best))
        spent = f", epsilon {state.epsilon:.3g} of {self.epsilon:g}" if self.noise != "none" else ""
        told = f"{shown(state.pool[best])} ({state.origins[best]}): score {state.notes['score']:.3f}"
        progress.line(f"best of {len(state.pool)} prompts after {state.notes['calls']:.0f} calls a silo{spent}: {told}")
        return state

    def serve(self, state: State) -> Prompted:
        return Prompted(state.pool[state.best], state.labels)

    def pooled(self, silos: int) -> Search:
        """One pooled silo: as many calls as all silos make. Its rows are in one place, so no noise hides them from it."""
        return replace(self, calls=self.calls * silos, noise="none")

    def noiseless(self) -> Search | None:
        """The same search without noise, to tell what noise costs; None where there is none."""
        return None if self.noise == "none" else replace(self, noise="none")

    def hand_written(self, labels: Sequence[str]) -> tuple[Prompted, ...]:
        """What the search begins with, each as it would be served."""
        return tuple(Prompted(made(prompt), tuple(labels)) for prompt in self.prompts)

    def export_prompt(self, state: State, folder: Path, template: str, last: State | None = None) -> None:
        """prompt.txt and prompt.json: for any model, by hand. `last`: of the search's end, which knows most of the prompt."""
        last = last or state
        scores = {silo: last.known.interval(state.best, s) for s, silo in enumerate(last.silos)}
        more = {"score": self.score, "origin": state.origins[state.best], "noise": self.noise}
        spent = {} if self.noise == "none" else {"epsilon": last.epsilon}
        write_prompt(folder, state.pool[state.best], state.labels, template, scores, more | spent)

    def example(self, resident: Resident, labels: int, number: int = 1) -> Tried:
        """A reply as it would leave a silo in the first exchange of a round."""
        import torch

        n = len(self.prompts)
        sums = torch.zeros(n, dtype=torch.float64)
        return Tried(sums, sums if self.noise == "none" else sums[:0], torch.zeros(n, dtype=torch.int64), (False,) * n)

    def _noted(self, state: State, best: int) -> dict[str, float]:
        score = min(1.0, max(0.0, float(state.known.mean()[best])))  # noise may take it further than a score goes
        notes = {
            "calls": float(state.known.counts.sum(0).max()), "model_calls": float(state.known.counts.sum()),
            "candidates": float(len(state.pool)), "skipped": float(state.skipped), "score": score,
        }  # fmt: skip
        declined = {"declined": float(state.declined)} if state.declined else {}
        return notes | declined | ({"epsilon": state.epsilon} if self.noise != "none" else {})

    def _silent(self, state: State, ask: Ask) -> str:
        """Why a whole round tried nothing."""
        floors = {name: state.floor(name) for name in ask.silos}
        most = max([self.minimum, *floors.values()])
        who = ", ".join(name for name, floor in floors.items() if floor > self.minimum) or "no silo"
        needed = math.ceil(most * len(state.running) / (1 - CONFIRMING))
        return (
            f"round {ask.round}: no silo tried a prompt: {who} says something of {most} rows or more, and calls = {self.calls} "
            f"are too few for {len(state.running)} prompts; set calls to {needed}, or lower the minimum there"
        )

    def _proposed(self, state: State, ask: Ask) -> State:
        """With this round's new candidates in the running."""
        dice = random.Random(f"{state.order}/{ask.round}")
        parents = [state.pool[c] for c in state.running]
        who = [p for p in self.proposers if p != "examples" or self.examples]
        if self.endpoint is not None and "endpoint" not in who:
            who.append("endpoint")
        pool, origins, skipped, secrets = list(state.pool), list(state.origins), state.skipped, self._secrets()
        for i, proposer in enumerate(who if self.proposals else ()):
            count = self.proposals // len(who) + (i < self.proposals % len(who))
            found, lost = self._by(proposer, parents, state.labels, count, ask, dice) if count else ([], 0)
            for prompt in found:
                if prompt in pool or holds(prompt, secrets):
                    lost += prompt not in pool  # another one of the same is no loss, one with a secret is
                    continue
                pool.append(prompt)
                origins.append(proposer)
            skipped += lost
        new = range(len(state.pool), len(pool))
        return replace(
            state, pool=tuple(pool), origins=tuple(origins), known=state.known.grown(len(new)),
            running=(*state.running, *new), skipped=skipped,
        )  # fmt: skip

    def _by(
        self, proposer: Proposer, parents: Sequence[Prompt], labels: Sequence[str], count: int, ask: Ask, dice: random.Random
    ) -> tuple[list[Prompt], int]:
        if proposer == "model":
            return proposing.by_model(parents, count, ask, self.temperature, dice)
        if proposer == "endpoint":
            assert self.endpoint is not None  # __post_init__ saw to it
            return proposing.by_endpoint(self.endpoint, parents, labels, count, self.temperature, dice)
        if proposer == "cross":
            made_up = [prompt for _ in range(count) if (prompt := proposing.crossed(parents, dice))]
            return made_up, count - len(made_up)
        return [proposing.exemplified(dice.choice(parents), self.examples, self.shots, dice) for _ in range(count)], 0

    def _noise(self, rounds: int) -> Noise:
        # a candidate is tried on a row once at most, so a row is in no more sums than there are candidates in the end
        return privacy.noise(self.noise, self.epsilon, self.delta, len(self.prompts) + rounds * self.proposals)

    def _secrets(self) -> list[str]:
        if not self.secrets:
            return []
        try:
            return [line.strip() for line in Path(self.secrets).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"[method] secrets = {self.secrets!r}: cannot be read ({error}); write a string a line") from error

    def _clean(self) -> None:
        secrets = self._secrets()
        for prompt in (*map(made, self.prompts), *(Prompt("{input}", examples=(pair,)) for pair in self.examples)):
            if holds(prompt, secrets):
                what = f"an example ({shown(prompt.examples[0][0])})" if prompt.examples else shown(prompt.template)
                raise UserError(f"[method] {what} holds a string of {self.secrets}, so it may not leave; remove one of them")

    def _within_limits(self, silos: Mapping[str, Any]) -> None:
        """Raises UserError for a limit of a silo's that would silence it, as far as it is known here."""
        for name, rows in silos.items():
            if (most := limits.of(rows).epsilon) < math.inf and self.noise == "none":
                told = "bounds what is told under noise, and there is none"
                raise UserError(f"[silo.{name}] epsilon = {most:g}: {told}; set [method] noise, or leave it out")
        # over a federation a silo's rows are not known here
        least = {name: (len(r.train), max(limits.of(r).minimum, self.minimum)) for name, r in silos.items() if r.train}
        if least and all(count < minimum for count, minimum in least.values()):
            told = ", ".join(f"{name} has {count} of {minimum}" for name, (count, minimum) in list(least.items())[:3])
            raise UserError(f"[method] minimum = {self.minimum}: no silo has so many training rows ({told}); lower it")

    def _answers(self, labels: Sequence[str]) -> None:
        """Raises UserError for an example whose answer is no label, and for a score that the task has not."""
        shown_ones = [*self.examples, *(pair for prompt in map(made, self.prompts) for pair in prompt.examples)]
        for _, answer in shown_ones if labels else ():
            if answer not in labels:
                raise UserError(f"[method] examples: answer {answer!r} is no label{suggest(answer, labels)}")
        if self.score == "accuracy" and not labels:
            raise UserError("[method] score = 'accuracy': is for labels; for answers of free text leave score out")


@in_silo(memory=False)
def look(silo: Silo, body: Look) -> Looked:
    resident, labels = silo.models["base"], silo.data.labels
    misfits = tuple(i for i, prompt in enumerate(body.prompts) if _misfit(resident, prompt, labels))
    return Looked(labels, silo.seed % 2**31, misfits)


def _misfit(resident: Resident, prompt: Prompt, labels: Sequence[str]) -> str:
    """Why no row at all could be asked so; "" where some could."""
    if prompt.words and len(prompt.words) != len(labels):
        return f"has {len(prompt.words)} words for {len(labels)} labels ({', '.join(labels)}); write one for each, in their order"
    size = len(resident.tokenizer(prompt.written("")).input_ids)
    return f"has {size} tokens, the model's context is {resident.context}; shorten it" if size >= resident.context else ""
