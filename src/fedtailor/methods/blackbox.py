"""Black-box soft prompts: CMA-ES in a random subspace, no gradient (BBT, Sun et al. 2022; FedBPT, Sun et al. 2024).

A soft prompt is e0 + A z: e0 the embeddings of a text, A random and known to all by its seed, z the few hundred numbers
that are searched. Silos read the model forwards only. "means": each silo evolves z on its own rows and sends how far its
mean moved, as in FedBPT. "losses": all silos rate the server's candidates, and the server evolves on the summed loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from fedtailor import wire
from fedtailor.answering import Answers
from fedtailor.core import Ask, Method, Silo, in_silo
from fedtailor.data import Row
from fedtailor.errors import RunError, SiloError
from fedtailor.methods import targets
from fedtailor.methods.soft_prompt import WEIGHT, SoftPrompt
from fedtailor.methods.virtual import instruction
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Begin:
    """Down, once, to one silo."""

    method: Blackbox


@dataclass(frozen=True)
class Begun:
    """Up: what every silo would say; no row is read."""

    labels: int
    seed: int  # of the subspace, from the experiment's


@dataclass(frozen=True)
class Evolve:
    """Down, each round of "means": where the search stands."""

    method: Blackbox
    z: Tensor  # (dimensions,) fp32
    sigma: float
    seed: int


@dataclass(frozen=True)
class Evolved:
    """Up: how far the mean of the silo's own search moved. Leaves out rows, losses of rows, and the candidates it tried."""

    delta: Tensor  # (dimensions,) fp32
    loss: float  # at z, mean nats over the rows of one batch; lower is better
    calls: float  # rows scored
    weight: float = 1.0

    def problem(self, asked: Evolve) -> str | None:
        if self.delta.shape != asked.z.shape or self.delta.dtype != torch.float32:
            return f"delta is {self.delta.dtype} {tuple(self.delta.shape)}, asked float32 {tuple(asked.z.shape)}"
        if (bad := wire.not_finite(self)) is not None:
            return f"{bad} is not finite"
        if not math.isfinite(self.loss) or not 0 < self.calls <= asked.method.most_calls or self.weight != 1.0:
            return f"loss {self.loss}, {self.calls} calls and weight {self.weight} are out of bounds"
        return None


@dataclass(frozen=True)
class Rate:
    """Down, each generation of "losses": the candidates."""

    method: Blackbox
    candidates: Tensor  # (population + 1, dimensions) fp32, the mean last
    seed: int


@dataclass(frozen=True)
class Rated:
    """Up: the mean loss of each candidate over one batch of the silo's rows, the same rows for all. No row leaves."""

    losses: Tensor  # (population + 1,) fp32, nats
    calls: float
    weight: float = 1.0

    def problem(self, asked: Rate) -> str | None:
        if self.losses.shape != (len(asked.candidates),) or self.losses.dtype != torch.float32:
            return f"losses are {self.losses.dtype} {tuple(self.losses.shape)}, asked {len(asked.candidates)}"
        if (bad := wire.not_finite(self)) is not None:
            return f"{bad} is not finite"
        if not 0 < self.calls <= asked.method.most_calls or self.weight != 1.0:
            return f"{self.calls} calls and weight {self.weight} are out of bounds"
        return None


@dataclass(frozen=True)
class State:
    """The server's."""

    tensors: Tensors  # {"z": (dimensions,)}
    seed: int
    labels: int
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subspaced:
    """What is served: a few hundred numbers, of which each side makes the soft prompt itself."""

    method: Blackbox
    z: Tensor
    seed: int
    labels: int = 0

    def on(self, resident: Resident) -> Tensors:
        """The soft prompt as `soft_prompt` would train it."""
        return self.method.prompt(resident, self.seed)(self.z)

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Answers:
        resident = models["base"]
        return Answers(resident, self.method.put_on(resident, self.labels), self.on(resident))


@dataclass(frozen=True)
class Blackbox(Method[State]):
    """Searches a soft prompt. Model calls of a silo and round: generations * population * batch_size, and one batch more."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    BESIDES: ClassVar[str] = (
        'Besides: once, before the first round, the number of labels from one silo; with share = "losses" in place of the '
        "above the mean loss of each candidate; at evaluation: sums and counts. No rows, texts or tokens leave."
    )

    dimensions: Annotated[int, Field(ge=1, le=1900)] = 200  # numbers searched: a reply stays below 8 kB, CMA-ES holds the square
    virtual_tokens: Count = 16
    init_text: str = SoftPrompt.init_text
    """Start from the embeddings of this text, repeated or cut to length."""
    share: Literal["means", "losses"] = "means"
    generations: Count = 2  # a round
    population: Annotated[int, Field(ge=4)] | None = None  # None: 4 + 3 ln(dimensions), as Hansen (2016) advises
    batch_size: Count = 16  # rows of a silo that a generation is rated on
    sigma: Positive = 0.5  # the first steps; of 1, a step is about as large as the embeddings themselves
    sigma_end: Positive = 0.1  # in the last round, falling geometrically

    def __post_init__(self) -> None:
        instruction(self.init_text)
        if not self.init_text:
            raise ValueError("init_text is empty; a subspace needs a text to begin at")

    @property
    def size(self) -> int:
        return self.population or 4 + math.floor(3 * math.log(self.dimensions))

    @property
    def most_calls(self) -> int:
        return (self.generations * self.size + 1) * self.batch_size

    @property
    def soft(self) -> SoftPrompt:
        return SoftPrompt(virtual_tokens=self.virtual_tokens, init_text=self.init_text)

    def put_on(self, resident: Resident, labels: int) -> Tuned:
        targets.claimed(self, resident)
        return self.soft.put_on(resident, labels)

    def prompt(self, resident: Resident, seed: int) -> Callable[[Tensor], Tensors]:
        """z -> the soft prompt's tensors, on the resident's device."""
        start = self.soft.initial(resident, self.put_on(resident, 0), 0)[WEIGHT]  # (virtual_tokens, width)
        spread = start.std() / math.sqrt(self.dimensions)
        turned = subspace(seed, start.numel(), self.dimensions)
        return lambda z: {WEIGHT: (start + spread * (turned @ z).view(start.shape)).to(resident.device)}

    def begin(self, ask: Ask) -> State:
        why = []
        for name in ask.silos:
            try:
                (reply,) = ask(begun, Begin(self), to=[name])
                notes = {"calls": 0.0, "model_calls": 0.0}
                return State({"z": torch.zeros(self.dimensions)}, reply.body.seed, reply.body.labels, notes)
            except RunError as error:  # this silo cannot: the next
                why.append(str(error))
        raise RunError(f"no silo could begin; {'; '.join(why[:3])}")

    def round(self, state: State, ask: Ask) -> State:
        z = state.tensors["z"]
        moved = self._by_means if self.share == "means" else self._by_losses
        new, loss, calls, silos = moved(state, ask)
        notes = {
            "train_loss": loss, "delta_norm": float((new - z).norm()),
            "calls": state.notes["calls"] + calls / silos, "model_calls": state.notes["model_calls"] + calls,
        }  # fmt: skip
        return replace(state, tensors={"z": new}, notes=notes)

    def serve(self, state: State) -> Subspaced:
        return Subspaced(self, state.tensors["z"], state.seed, state.labels)

    def pooled(self, silos: int) -> Blackbox:
        """One pooled silo: a generation is rated on as many rows as all silos rate it on."""
        return replace(self, batch_size=self.batch_size * silos)

    def sigma_of(self, number: int, rounds: int) -> float:
        """The first steps of a round's search (1-based)."""
        part = (number - 1) / max(rounds - 1, 1)
        return float(self.sigma * (min(self.sigma_end, self.sigma) / self.sigma) ** part)

    def example(self, resident: Resident, labels: int, number: int = 1) -> Evolved:
        return Evolved(torch.zeros(self.dimensions), 1.2345678901234567, float(self.most_calls))

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A folder that `PeftModel.from_pretrained(base, folder)` loads: an ordinary soft prompt."""
        self.soft.export(resident, tensors, folder)

    def _by_means(self, state: State, ask: Ask) -> tuple[Tensor, float, float, int]:
        z = state.tensors["z"]
        total = ask.total(evolve, Evolve(self, z, self.sigma_of(ask.round, ask.rounds), state.seed))
        n = total.weight
        return z + total.sum.delta / n, total.sum.loss / n, total.sum.calls, len(total.silos)

    def _by_losses(self, state: State, ask: Ask) -> tuple[Tensor, float, float, int]:
        calls, first, silos = 0.0, math.nan, 1

        def rated(candidates: Tensor) -> Tensor:
            nonlocal calls, first, silos
            total = ask.total(rate, Rate(self, candidates, state.seed))
            calls, silos = calls + total.sum.calls, len(total.silos)
            losses: Tensor = total.sum.losses / total.weight
            if math.isnan(first):
                first = float(losses[-1])
            return losses

        z, sigma = state.tensors["z"], self.sigma_of(ask.round, ask.rounds)
        return evolved(z, sigma, self.generations, self.size, state.seed + ask.round, rated), first, calls, silos


@in_silo(memory=False)
def begun(silo: Silo, body: Begin) -> Begun:
    body.method.put_on(silo.models["base"], len(silo.data.labels))
    return Begun(len(silo.data.labels), silo.seed % 2**31)


@in_silo(memory=False)
def evolve(silo: Silo, body: Evolve) -> Evolved:
    calls, first = 0, math.nan

    def rated(candidates: Tensor) -> Tensor:
        nonlocal calls, first
        rows = _batch(silo, body.method.batch_size, calls)
        losses = _losses(silo, body.method, body.seed, candidates if math.isnan(first) else candidates[:-1], rows)
        calls += len(losses) * len(rows)
        if math.isnan(first):
            first = float(losses[-1])
        return losses

    z = evolved(body.z, body.sigma, body.method.generations, body.method.size, silo.seed, rated)
    return Evolved(z - body.z, first, float(calls))


@in_silo(memory=False)
def rate(silo: Silo, body: Rate) -> Rated:
    rows = _batch(silo, body.method.batch_size, 0)
    losses = _losses(silo, body.method, body.seed, body.candidates, rows)
    return Rated(losses, float(len(losses) * len(rows)))


def evolved(
    z: Tensor, sigma: float, generations: int, size: int, seed: int, rated: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean of CMA-ES after some generations from z. `rated`: (size + 1, d), the mean last, -> the losses of these."""
    from cmaes import CMA

    search = CMA(mean=z.double().numpy(), sigma=sigma, population_size=size, seed=seed % 2**32)
    for _ in range(generations):
        tried = [search.ask() for _ in range(size)]
        losses = rated(torch.from_numpy(numpy.stack([*tried, search.mean])).float())
        search.tell([(one, float(loss)) for one, loss in zip(tried, losses[:size].tolist(), strict=True)])
    return torch.from_numpy(search.mean.copy()).float()


@lru_cache(maxsize=2)
def subspace(seed: int, width: int, dimensions: int) -> Tensor:
    """(width, dimensions) standard normal: the same wherever torch is the same. Its reader must not write into it."""
    return torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed))


def _batch(silo: Silo, size: int, skip: int) -> list[Row]:
    dice = torch.Generator().manual_seed(silo.seed % 2**62 + skip)
    rows = silo.data.train
    return [rows[i] for i in torch.randperm(len(rows), generator=dice)[:size].tolist()]


@torch.no_grad()
def _losses(silo: Silo, method: Blackbox, seed: int, candidates: Tensor, rows: Sequence[Row]) -> Tensor:
    """(candidates,) mean nats, fp32: of the right label among the labels; of text, per token of the right answer."""
    resident, labels = silo.models["base"], silo.data.labels
    tuned, prompt = method.put_on(resident, len(labels)), method.prompt(resident, seed)
    found = []
    for z in candidates:
        model = Answers(resident, tuned, prompt(z))
        if labels:
            true = torch.tensor([[labels.index(row.answer)] for row in rows])
            found.append(-model.scores(rows, labels).log_softmax(1).gather(1, true).mean())
        else:
            likely = model.logprobs(rows)
            found.append(torch.tensor(-sum(total for total, _ in likely) / max(sum(places for _, places in likely), 1)))
    losses = torch.stack(found).float()
    if not bool(losses.isfinite().all()):
        raise SiloError("a loss is not finite: lower method.sigma")
    return losses
