"""The template of the gradient family: train locally, send the change, average (FedAvg, McMahan et al. 2017).

A method on it says what is trained (`config`), where it starts (`initial`), and how it is exported. What leaves a silo
is `Trained`: the change of the trainable tensors, the rows seen, the mean loss. Rows, tokens and optimizer state stay.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor import aggregate, training, wire
from fedtailor.answering import Answers
from fedtailor.core import Ask, Method, Silo, in_silo
from fedtailor.errors import RunError, SiloError
from fedtailor.exporting import save_adapter
from fedtailor.methods import fedopt, scaffold, targets
from fedtailor.methods.scaffold import Shift
from fedtailor.models import Resident
from fedtailor.tuned import Tensors, Tuned, joined, norm

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Batches = Callable[[Silo, training.Local], list[list[Any]]]  # of each local step: `training.draw`
OF_THE_BASE = (".ia3_l.", ".ln_tuning_layers.", ".lora_magnitude_vector.")  # in names of what is not 0 in an untouched base


@dataclass(frozen=True)
class Begin:
    """Down, once, to one silo: which method. Nothing of the silo's data is read to answer it."""

    method: Averaging


@dataclass(frozen=True)
class Initial:
    """Up: the trainable tensors before any training, made from the resident base and the seed."""

    tensors: Tensors


@dataclass(frozen=True)
class Train:
    """Down, each round: the tensors to start from and the learning rate of each local step."""

    method: Averaging
    tensors: Tensors
    lrs: tuple[float, ...]
    fixed: Tensors = field(default_factory=dict)  # used, and not trained this round: see `tuned.joined`
    control: Tensors = field(default_factory=dict)  # SCAFFOLD's, of the server
    number: int = 0  # of the round
    heard: Mapping[str, int] = field(default_factory=dict)  # SCAFFOLD: the last round of each silo that counted


@dataclass(frozen=True)
class Trained:
    """Up, each round: what changed. Leaves out rows, tokens, per-row losses and optimizer state."""

    delta: Tensors  # fp32, same names and shapes as asked
    weight: float  # rows seen this round, or rows held: `Averaging.weigh`
    loss: float  # mean nats per label place while training; lower is better
    control: Tensors = field(default_factory=dict)  # SCAFFOLD: `scaffold.told`

    def problem(self, asked: Train) -> str | None:
        """Why this reply must not be averaged in, or None."""
        if set(self.delta) != set(asked.tensors):
            odd = sorted(set(self.delta) ^ set(asked.tensors))
            return f"tensor names differ from those asked, first {odd[0]!r}"
        for name, like in asked.tensors.items():
            got = self.delta[name]
            if got.shape != like.shape or got.dtype != torch.float32:
                return f"{name} is {got.dtype} {tuple(got.shape)}, asked float32 {tuple(like.shape)}"
        if {n: t.shape for n, t in self.control.items()} != {n: t.shape for n, t in asked.control.items()}:
            return "control variates differ from those asked"
        if (bad := wire.not_finite(self)) is not None:
            return f"{bad} is not finite"
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        if not 0 < self.weight <= asked.method.most_rows(len(asked.lrs)):
            return f"weight {self.weight} is out of bounds"
        limit = asked.method.max_delta_norm
        if limit is not None and (length := norm(self.delta)) > limit:
            return f"norm {length:.3g} is above method.max_delta_norm = {limit:.3g}"
        return None


@dataclass(frozen=True)
class State:
    """The server's: the tensors, its optimizer's moments ("m/<name>", "v/<name>"), what the last round told."""

    tensors: Tensors
    moments: Tensors = field(default_factory=dict)
    fixed: Tensors = field(default_factory=dict)  # of what is served, beside the tensors: see `tuned.joined`
    control: Tensors = field(default_factory=dict)
    heard: Mapping[str, int] = field(default_factory=dict)  # see `Train`
    silos: int = 0  # of the federation, this round's or not
    notes: Mapping[str, float] = field(default_factory=dict)  # goes into the log of rounds


@dataclass(frozen=True)
class Adapted:
    """What is served: the base with these tensors on it."""

    method: Averaging
    tensors: Tensors
    labels: int = 0

    def open(self, models: Mapping[str, Any], ask: Ask | None = None) -> Answers:
        resident = models["base"]
        tensors = {name: tensor.to(resident.device) for name, tensor in self.tensors.items()}  # once, not per batch
        return Answers(resident, self.method.put_on(resident, self.labels), tensors)


@dataclass(frozen=True)
class Averaging(Method[State], abc.ABC):
    """Settings shared by all that train by gradients. Rows per silo and round: local_steps * batch_size * accumulate."""

    FOR: ClassVar[tuple[str, ...]] = ("causal", "encoder", "vision", "seq2seq")  # kinds of base that it can be put on

    lr: Positive = 1e-3
    local_steps: Count = 8
    batch_size: Count = 8
    accumulate: Count = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    optimizer_state: Literal["reset", "keep"] = "reset"  # a silo's moments: fresh each round, or kept in its memory
    weight_decay: NotNegative = 0.0
    clip: NotNegative = 1.0  # of each silo's gradient norm; 0: none
    prox: NotNegative = 0.0  # FedProx's mu (Li et al. 2020)
    scaffold: bool = False  # control variates (Karimireddy et al. 2020): twice the bytes
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # over all rounds
    warmup_rounds: NotNegative = 0.0
    aggregate: str = "mean"
    byzantine: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # assumed share of attackers, for aggregates that need one
    weigh: Literal["seen", "held"] = "seen"  # a reply's weight: rows seen this round, or (on the silo's word) rows held
    max_delta_norm: Positive | None = None  # a reply with a larger one is rejected
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = "none"  # see `fedopt`
    server_lr: Positive | None = None  # None: what suits the kind, see `fedopt.LR`
    server_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of server_lr, over all rounds
    server_momentum: Decay = 0.9
    server_beta2: Decay = 0.99
    server_epsilon: Positive = fedopt.EPSILON

    @abc.abstractmethod
    def config(self, resident: Resident) -> Any:
        """The PEFT config of what is trained; None trains the base's own weights."""

    def initial(self, resident: Resident, tuned: Tuned, seed: int) -> Tensors:
        """The trainable tensors before training. Same seed, same tensors."""
        return tuned.tensors()

    @property
    def dropping(self) -> bool:
        """Whether what is trained has dropout of its own."""
        return False

    @property
    def one_by_one(self) -> str:
        """Why silos cannot train many in one pass; empty where they can."""
        return "each silo draws dropout masks of its own" if self.dropping else ""

    @property
    def server_rate(self) -> float:
        return fedopt.LR[self.server_optimizer] if self.server_lr is None else self.server_lr

    def mine(self, settings: Mapping[str, Any]) -> Averaging:
        """This method with a silo's own settings."""
        return replace(self, **settings)

    def put_on(self, resident: Resident, labels: int) -> Tuned:
        targets.claimed(self, resident)
        return resident.tuned(self.config(resident), labels if resident.classifier else 0)

    def begin(self, ask: Ask) -> State:
        # any silo's base gives the same start; the server needs no model of its own
        why = []
        for name in ask.silos:
            try:
                (reply,) = ask(start, Begin(self), to=[name])
                return State(reply.body.tensors, silos=len(ask.silos))
            except RunError as error:  # this silo cannot: the next
                why.append(str(error))
        raise RunError(f"no silo could make the first tensors; {'; '.join(why[:3])}")

    def round(self, state: State, ask: Ask) -> State:
        body = self.asked(state, ask)
        if self.aggregate == "mean":
            total = ask.total(train, body)
            weight, summed = total.weight, total.sum
            delta, loss = {n: d / weight for n, d in summed.delta.items()}, summed.loss / weight
            shift = Shift(summed.control, total.silos)
        else:
            heard = list(ask(train, body))
            replies, shift = [reply.body for reply in heard], scaffold.shift(heard)
            combine = aggregate.find(self.aggregate, self.byzantine)
            delta = combine([(r.delta, r.weight) for r in replies])
            if not all(bool(d.isfinite().all()) for d in delta.values()):
                raise RunError(f"round {ask.round}: method.aggregate = {self.aggregate!r} gave numbers that are not finite")
            loss = mean_loss(replies)
        return self.stepped(state, ask, body, delta, {"train_loss": loss}, shift)

    def asked(self, state: State, ask: Ask) -> Train:
        """What goes down in this round."""
        tensors, fixed = self.split(state, ask.round)
        blank = {n: torch.zeros_like(t) for n, t in tensors.items()} if self.scaffold else {}
        control = {n: state.control.get(n, t) for n, t in blank.items()}
        return Train(self, tensors, self.lrs(ask.round, ask.rounds), fixed, control, ask.round, state.heard)

    def split(self, state: State, number: int) -> tuple[Tensors, Tensors]:
        """The tensors that round `number` trains, and those that are used as they are."""
        return state.tensors, state.fixed

    def stepped(
        self, state: State, ask: Ask, body: Train, delta: Tensors, notes: Mapping[str, float], shift: Shift
    ) -> State:
        """The state after the mean change `delta` and the `shift` of the control variates."""
        # taken in the middle of the round: the end of the last one is the end of the schedule, its 0
        lr = self.server_rate * training.schedule(self.server_schedule, (ask.round - 0.5) / max(ask.rounds, 1), 0.0)
        server = fedopt.Server(self.server_optimizer, lr, self.server_momentum, self.server_beta2, self.server_epsilon)
        tensors, moments = server.step(body.tensors, state.moments, delta)
        heard = {**state.heard, **dict.fromkeys(shift.silos, ask.round)} if self.scaffold else {}
        count = max(state.silos, len(heard))
        control = {n: body.control[n] + c / count for n, c in shift.sum.items()}
        return replace(
            state, tensors={**state.tensors, **tensors}, moments={**state.moments, **moments},
            control={**state.control, **control}, heard=heard, notes={**notes, "delta_norm": norm(delta)},
        )  # fmt: skip

    def serve(self, state: State) -> Adapted:
        return Adapted(self, joined(state.tensors, state.fixed), labels_of(state.tensors))

    def pooled(self, silos: int) -> Averaging:
        """One pooled silo: as many local steps as all silos take, optimizer kept, nothing that is meant for many silos."""
        return replace(
            self, local_steps=self.local_steps * silos, optimizer_state="keep", server_optimizer="none", server_lr=None,
            server_schedule="constant", aggregate="mean", prox=0.0, scaffold=False, max_delta_norm=None,
        )  # fmt: skip

    def most_rows(self, steps: int) -> float:
        """The largest weight that is believed; a silo may have settings of its own, and a held set is not known here."""
        return 2.0**31 if self.weigh == "held" else steps * self.batch_size * self.accumulate * 1024.0

    def lrs(self, number: int, rounds: int) -> tuple[float, ...]:
        """The learning rate of each local step of a round (1-based)."""
        steps = range((number - 1) * self.local_steps, number * self.local_steps)
        whole = rounds * self.local_steps
        # a step's factor is taken at its middle, so that a linear schedule neither starts at 0 nor ends there
        return tuple(
            self.lr * training.schedule(self.schedule, (step + 0.5) / whole, self.warmup_rounds / rounds)
            for step in steps
        )

    def local(self, lrs: tuple[float, ...]) -> training.Local:
        size, accumulate = self.batch_size, self.accumulate
        return training.Local(lrs, size, accumulate, self.optimizer, self.weight_decay, self.clip, self.prox, self.dropping)

    def example(self, resident: Resident, labels: int, number: int = 1) -> Trained:
        """A reply of round `number` as it would leave a silo, of the same size but for a digit of the loss: what `fedtailor
        check` lists. Rounds differ at most by being odd or even."""
        tensors, _ = self.split(State(self.put_on(resident, labels).tensors()), number)
        rows = self.local_steps * self.batch_size * self.accumulate
        zeros = {n: torch.zeros_like(t) for n, t in tensors.items()}
        return Trained(zeros, float(rows), 1.2345678901234567, zeros if self.scaffold else {})

    def export(self, resident: Resident, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A folder that `PeftModel.from_pretrained(base, folder)` loads; of what PEFT has not, one with its own load.py."""
        save_adapter(self.put_on(resident, labels_of(tensors)), tensors, folder)


@in_silo(memory=False)
def start(silo: Silo, body: Begin) -> Initial:
    resident = silo.models["base"]
    tuned = body.method.put_on(resident, len(silo.data.labels))
    return Initial(body.method.initial(resident, tuned, silo.seed))


def labels_of(tensors: Mapping[str, Tensor]) -> int:
    """How many classes the head among these tensors tells apart; 0: there is none."""
    return len(tensors["head.bias"]) if "head.bias" in tensors else 0


def mean_loss(replies: Sequence[Trained]) -> float:
    return math.fsum(r.loss * r.weight for r in replies) / math.fsum(r.weight for r in replies)


def train_many(silos: Sequence[Silo], body: Train) -> list[Trained | wire.Failure]:
    """The cohort step: all silos in one pass. Silos with settings of their own take the plain step, and a quantized base does."""
    resident = silos[0].models["base"]
    if len(silos) > 1 and (
        resident.quantized
        or any(silo.data.settings for silo in silos)
        or body.method.put_on(resident, len(silos[0].data.labels)).alone
    ):
        return [done for silo in silos for done in train_many([silo], body)]
    method = body.method.mine(silos[0].data.settings)
    return taught(silos, body, method, resident, method.put_on(resident, len(silos[0].data.labels)))


def taught(
    silos: Sequence[Silo], body: Train, method: Averaging, resident: Resident, tuned: Tuned, batches: Batches | None = None
) -> list[Trained | wire.Failure]:
    """What the silos tell after training `tuned` as `method` says, on their rows or what `batches` draws of them."""
    begun, fixed, control = body.tensors, body.fixed, body.control
    if method != body.method:  # a silo of lower rank or fewer virtual tokens
        shapes = {n: t.shape for n, t in tuned.tensors().items()}
        begun, fixed = ({n: _cut(t, shapes[n]) if n in shapes else t for n, t in some.items()} for some in (begun, fixed))
        if any(c.shape != begun[n].shape for n, c in control.items()):
            raise SiloError(f"[silo.{silos[0].name}] {scaffold.UNEQUAL}")
    kept = method.optimizer_state == "keep"
    moments = [silo.memory.get("moments", {}) if kept else {} for silo in silos]
    mine = [scaffold.variate(silo.name, silo.memory, body.heard) for silo in silos]
    drift = [{n: c - own[n] if n in own else c for n, c in control.items()} for own in mine] if control else ()
    lrs = body.lrs if method.local_steps == body.method.local_steps else _stretch(body.lrs, method.local_steps)
    how = method.local(tuple(lr * method.lr / body.method.lr for lr in lrs))
    some = [(silo.data, silo.seed) for silo in silos]
    # decay pulls towards the base: such as starts from the base's own values back to them, all else to 0
    neutral = {n: t for n, t in tuned.tensors().items() if any(part in n for part in OF_THE_BASE)} if how.weight_decay else {}
    drawn = None if batches is None else [batches(silo, how) for silo in silos]
    done = training.train(resident, tuned, begun, some, how, moments, fixed, drift, neutral, drawn)
    replies: list[Trained | wire.Failure] = []
    for s, silo in enumerate(silos):
        if (why := done.failed[s]) is not None:
            replies.append(wire.Failure(why))
            continue
        if kept:  # of what another round trained, the moments stay
            silo.memory["moments"] = {**silo.memory.get("moments", {}), **training.moments_of(done, s)}
        delta = {n: _padded(done.tensors[n][s].cpu() - begun[n], t.shape) for n, t in body.tensors.items()}
        seen = len(how.lrs) * how.batch_size * how.accumulate
        weight = float(len(silo.data.train) if body.method.weigh == "held" else seen)
        shift = {}
        if control:
            gradient = {n: done.gradient[n][s].cpu() for n in control}
            shift = scaffold.told(mine[s], gradient, weight)
            silo.memory |= {"control": mine[s], "sent": {"round": body.number, "control": gradient}}
        replies.append(Trained(delta, weight, done.loss[s], shift))
    return replies


def probe(body: Train) -> Train | None:
    """One local step, for timing a cohort; None where a cohort cannot stand in for the plain step."""
    if body.method.one_by_one:
        return None
    return replace(body, method=replace(body.method, local_steps=1), lrs=body.lrs[:1])


train_many.probe = probe  # type: ignore[attr-defined]


@in_silo(cohort=train_many)
def train(silo: Silo, body: Train) -> Trained:
    (up,) = train_many([silo], body)
    if isinstance(up, wire.Failure):
        raise SiloError(up.error)
    return up


def _cut(t: Tensor, shape: torch.Size) -> Tensor:
    """The leading corner: a silo of lower rank or fewer virtual tokens trains the first ones."""
    return t[tuple(slice(n) for n in shape)]


def _padded(t: Tensor, shape: torch.Size) -> Tensor:
    """Back to the asked shape: what the silo does not train, it does not change."""
    if t.shape == shape:
        return t
    whole = torch.zeros(shape)
    whole[tuple(slice(n) for n in t.shape)] = t
    return whole


def _stretch(lrs: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """The round's learning rates over another number of steps."""
    return tuple(lrs[i * len(lrs) // steps] for i in range(steps))


LOCAL = frozenset(
    {"lr", "local_steps", "batch_size", "accumulate", "weight_decay", "clip", "prox", "optimizer", "optimizer_state"}
)  # settings that [silo.NAME] may set without changing what is averaged


def per_silo(method: type[Any]) -> frozenset[str]:
    """Settings of a method that one silo may override."""
    return (LOCAL | getattr(method, "PER_SILO", frozenset())) & {f.name for f in fields(method)}
