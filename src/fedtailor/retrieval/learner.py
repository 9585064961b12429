"""An embedder that is trained as it is used: its own preprocessing and prompts, its own modules after the transformer.

Each question is to be nearer to its own passage than to the other passages of its batch: cross entropy over their cosines
divided by a temperature (multiple negatives ranking, Henderson et al. 2017; InfoNCE, van den Oord et al. 2018).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor import models
from fedtailor.errors import UserError
from fedtailor.methods.averaging import Averaging
from fedtailor.models import Resident
from fedtailor.retrieval import embedding
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.store import Vectors
from fedtailor.training import Local
from fedtailor.tuned import Tensors, Tuned

TEMPERATURE = 0.05
ROLES = {"query": ("query",), "document": ("document", "passage", "corpus")}  # what sentence-transformers calls their prompts
Features = dict[str, Any]  # of B texts: "input_ids" (B, T) and others, as the embedder's own preprocessing makes them


@dataclass(frozen=True)
class Pairs:
    """B questions and the passage of each."""

    questions: Features
    passages: Features

    def to(self, device: torch.device) -> Pairs:
        return Pairs(*({k: v.to(device) if isinstance(v, Tensor) else v for k, v in some.items()} for some in self._both()))

    def alike(self) -> Tensor:
        """(B, B) bool: whether the passage of one answers another's question, too, since they share a text, as the model reads
        it. False of a pair with itself."""
        ids = [some["input_ids"] for some in self._both()]
        same = [(one[:, None] == one[None]).all(-1) for one in ids]
        alike: Tensor = same[0] | same[1]
        return alike.fill_diagonal_(False)

    def _both(self) -> tuple[Features, Features]:
        return self.questions, self.passages


class Reader(Tuned):
    """An embedder's transformer with what is trained on it, where the loss is contrastive: `training.train` takes it."""

    def __init__(self, tuned: Tuned, embedder: Embedder, temperature: float, both: bool) -> None:
        super().__init__(tuned.inner)
        self.embed = partial(_embed, embedder)  # no child: its tensors would have two names
        self.temperature, self.both = temperature, both

    def forward(self, made: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Whatever it is, made while the tensors of `using` are in place."""
        return made()

    def losses(self, tensors: Mapping[str, Tensor] | None, pairs: Pairs) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Summed over the pairs, in nats (fp32), and how many these are. One whose text another has too is none of that one's
        negatives. `both`: the mean of both directions."""
        asked, held = self.using(tensors, lambda: (self.embed(pairs.questions), self.embed(pairs.passages)))
        scores = (asked @ held.T / self.temperature).masked_fill(pairs.alike(), -torch.inf)
        count = torch.tensor(len(scores), device=scores.device)
        places = torch.arange(len(scores), device=scores.device)
        ways = [scores, scores.T] if self.both else [scores]
        found = [nn.functional.cross_entropy(way, places, reduction="sum") for way in ways]
        return torch.stack(found).mean(), count


def _embed(embedder: Embedder, features: Features) -> Tensor:
    """(B, size) fp32 of unit length."""
    made: Tensor = embedder.model(dict(features))["sentence_embedding"]  # a copy: each module adds to what it gets
    return nn.functional.normalize(made[:, : embedder.size].float(), dim=1)


@dataclass(frozen=True)
class Learner:
    """An embedder with a trainer on it. Of several trainers on one embedder, each goes on again when it is used."""

    base: Embedder
    resident: Resident
    trainer: Averaging

    def reader(self, temperature: float = TEMPERATURE, both: bool = False) -> Reader:
        """Raises UserError for a trainer whose tensors could not become part of the embedder's weights."""
        tuned = self.trainer.put_on(self.resident, 0)
        reader = Reader(tuned, self.base, temperature, both)
        if tuned.added is not None or tuned.shift or not reader.names():
            name = type(self.trainer).__module__.rpartition(".")[2]
            raise UserError(
                f"[method] trainer: what {name} trains is not merged into an embedder's weights; "
                "choose full, ia3, layernorm, lora, vera, or peft with such a type"
            )
        return reader

    def initial(self, seed: int) -> Tensors:
        return self.trainer.initial(self.resident, self.reader(), seed)

    def embedder(self, tensors: Tensors) -> Embedder:
        """The embedder with these tensors on it; {}: as it was loaded."""
        digest = hashlib.sha256(self.base.sha256.encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().float().numpy().tobytes())
        placed = {name: tensor.to(self.resident.device) for name, tensor in tensors.items()}  # once, not per batch
        name, sha256 = (f"{self.base.name} (trained)", digest.hexdigest()) if tensors else (self.base.name, self.base.sha256)
        return _Embedder(self.base.model, name, sha256, self, placed)

    def batch(self, pairs: Sequence[tuple[str, str]]) -> Pairs:
        return Pairs(self._features([q for q, _ in pairs], "query"), self._features([p for _, p in pairs], "document"))

    def _features(self, texts: list[str], role: str) -> Features:
        """As `encode_query` and `encode_document` make them, cut to what the embedder reads."""
        model = self.base.model
        name = next((one for one in ROLES[role] if one in model.prompts), model.default_prompt_name)
        return dict(model.preprocess(texts, prompt=model.prompts.get(name), task=role))


@dataclass(frozen=True)
class _Embedder(Embedder):
    learner: Learner = field(repr=False, compare=False)
    tensors: Tensors = field(repr=False, compare=False)

    @property
    def base(self) -> Embedder:
        return self.learner.base

    def _made(self, texts: Sequence[str], how: str) -> Vectors:
        made = partial(super()._made, texts, how)
        if self.tensors:
            return self.learner.reader().using(self.tensors, made)  # type: ignore[no-any-return]
        self.learner.resident.tuned()  # takes off what is on
        return made()


def drawn(count: int, how: Local, seed: int) -> list[list[list[int]]]:
    """Of `count` pairs those of each batch, steps x accumulate x batch_size: without replacement until there are no more, then
    anew."""
    size, passes = how.batch_size, len(how.lrs) * how.accumulate
    dice, order = torch.Generator().manual_seed(seed % 2**63), list[int]()
    while len(order) < passes * size:
        order += torch.randperm(count, generator=dice).tolist()
    batches = [order[i * size : (i + 1) * size] for i in range(passes)]
    return [batches[i : i + how.accumulate] for i in range(0, passes, how.accumulate)]


def learner(name: str, trainer: Averaging) -> Learner:
    """`name`: as `embedding.load` takes it. Raises UserError for what cannot be trained so."""
    if trainer.batch_size < 2:
        raise UserError("[method] trainer: batch_size = 1 leaves a question no other passage to tell its own from; set 2 or more")
    made = Learner(*_base(name), trainer)
    made.reader()
    return made


@cache
def _base(name: str) -> tuple[Embedder, Resident]:
    """Loaded once a process."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    base = embedding.load(name)
    base.model.requires_grad_(False)
    if not isinstance(base.model[0], Transformer):
        kind = type(base.model[0]).__name__
        raise UserError(f"embedder {name!r}: it begins with a {kind}, and what is trained is a transformer; choose another")
    return base, models.resident(base.model[0].model, base.model.tokenizer, source=name, kind="encoder")


def export(learner: Learner, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A folder that `SentenceTransformer(folder)` and `fedtailor index add --embedder folder` load: the weights are merged."""
    reader = learner.reader()
    whole: Any = copy.deepcopy(reader.inner)
    for name, parameter in whole.named_parameters():
        if name in tensors:  # set, not copied into: what LoRA's `exact` keeps has made some of them larger
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
    merged = whole.merge_and_unload() if reader.peft else whole
    model = copy.deepcopy(learner.base.model, {id(learner.resident.module): merged})  # with this in the transformer's place
    model.save_pretrained(str(folder), create_model_card=False)
