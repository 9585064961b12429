"""An embedder that is trained: the loss written out by hand, and vectors that are those of other people's code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtailor.errors import UserError
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.bitfit import BitFit
from fedtailor.methods.full import Full
from fedtailor.methods.head import Head
from fedtailor.methods.ia3 import IA3
from fedtailor.methods.layernorm import LayerNorm
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.methods.soft_prompt import SoftPrompt
from fedtailor.methods.vera import Vera
from fedtailor.models import Resident
from fedtailor.retrieval import embedding, learner
from fedtailor.retrieval.learner import drawn, export
from fedtailor.retrieval.store import SCALE
from fedtailor.training import Local
from fedtailor.tuned import Tensors
from tiny_embedders import PROMPTS, bare, whole

PAIRS = [("who slept?", "The cat slept."), ("who ran?", "The old dog ran far."), ("what sang?", "A bird.")]
TEXTS = ["the cat", "a much longer text than that, and of more words", ""]
TRAINERS: dict[str, Averaging] = {
    "lora": Lora(rank=2), "dora": Lora(rank=2, dora=True), "full": Full(), "ia3": IA3(), "vera": Vera(rank=4),
    "layernorm": LayerNorm(),
}  # fmt: skip
trainers = pytest.mark.parametrize("kind", TRAINERS)


@pytest.fixture(scope="module")
def made(resident_of: Callable[[str], Resident], tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole(resident_of("bert"), tmp_path_factory.mktemp("whole"))


def moved(tensors: Tensors, by: float = 0.05) -> Tensors:
    """As if trained."""
    dice = torch.Generator().manual_seed(3)
    return {n: t + by * torch.randn(t.shape, generator=dice) for n, t in tensors.items()}


def unit(vectors: Any) -> Any:
    return np.asarray(vectors, dtype=np.float64) / SCALE


@trainers
def test_untouched_it_gives_the_embedders_own_vectors(made: str, kind: str) -> None:
    plain, one = embedding.load(made), learner.learner(made, TRAINERS[kind])
    start = one.initial(7)
    assert not any(name.startswith("head.") for name in start)
    for tensors in (start, {}):
        found = one.embedder(tensors)
        assert (found.size, found.reads) == (plain.size, plain.reads) == (16, 48)
        for how in ("questions", "passages"):
            assert np.abs(unit(getattr(found, how)(TEXTS)) - unit(getattr(plain, how)(TEXTS))).max() < 1e-4
    assert one.embedder({}).sha256 == plain.sha256 == one.base.sha256
    assert len({one.embedder(t).sha256 for t in ({}, start, moved(start))}) == 3
    assert one.embedder(start).passages([]).shape == (0, 16)


def hand(made: str, tensors: Tensors, texts: list[str], prompt: str) -> Tensor:
    """Unit vectors, each text alone: transformers' own model, the mean of its states, the layer after it."""
    from transformers import AutoModel, AutoTokenizer

    module, tokenizer = AutoModel.from_pretrained(made).eval(), AutoTokenizer.from_pretrained(made)
    layer = embedding.load(made).model[2].linear
    weights = dict(module.named_parameters())
    for name, down in tensors.items():
        if ".lora_A." in name:  # twice the product is added to the weight
            at = name.removeprefix("base_model.model.").replace(".lora_A.default.", ".")
            weights[at] = weights[at] + 2 * tensors[name.replace(".lora_A.", ".lora_B.")] @ down
        elif ".lora_B." not in name:
            weights[name] = tensors[name]
    rows = []
    for text in texts:
        ids = tokenizer(prompt + text, return_tensors="pt", truncation=True, max_length=48)
        states = torch.func.functional_call(module, weights, (), dict(ids)).last_hidden_state[0]
        rows.append(torch.tanh(states.mean(0) @ layer.weight.T + layer.bias))
    return torch.stack([row / row.norm() for row in rows])


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_and_gradients_are_those_of_the_formula(made: str, kind: str, both: bool) -> None:
    one = learner.learner(made, TRAINERS[kind])
    reader, tensors = one.reader(0.1, both), moved(one.initial(7))
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    loss, count = reader.losses(leaves, one.batch(PAIRS))
    mine = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    again = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    asked, held = (hand(made, again, list(t), PROMPTS[p]) for t, p in zip(zip(*PAIRS, strict=True), PROMPTS, strict=True))
    scores = asked @ held.T / 0.1
    expected = sum(scores[i].exp().sum().log() - scores[i, i] for i in range(3))
    if both:
        expected = (expected + sum(scores[:, i].exp().sum().log() - scores[i, i] for i in range(3))) / 2
    assert count == 3
    assert loss.item() == pytest.approx(float(expected.detach()), rel=1e-4)
    theirs = torch.autograd.grad(expected, list(again.values()), allow_unused=True)  # type: ignore[arg-type]
    largest = 0.0
    for name, g, e in zip(tensors, mine, theirs, strict=True):
        assert (g is None) == (e is None), name
        if g is not None and e is not None:
            assert torch.allclose(g, e, atol=1e-4, rtol=1e-3), name
            largest = max(largest, float(e.abs().max()))
    assert largest > 1e-2


def test_what_another_pair_has_too_is_no_negative(made: str) -> None:
    """Of four pairs the first two share a passage and the last two a question: each is told from two others alone."""
    pairs = [("a", "X"), ("b", "X"), ("c", "Y"), ("c", "Z")]
    one = learner.learner(made, TRAINERS["lora"])
    batch = one.batch(pairs)
    assert batch.alike().nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    loss, count = one.reader(0.1).losses(None, batch)
    plain = embedding.load(made)
    cosines = unit(plain.questions([q for q, _ in pairs])) @ unit(plain.passages([p for _, p in pairs])).T
    told = {0: (0, 2, 3), 1: (1, 2, 3), 2: (2, 0, 1), 3: (3, 0, 1)}
    expected = sum(math.log(sum(math.exp(cosines[i, j] / 0.1) for j in js)) - cosines[i, i] / 0.1 for i, js in told.items())
    assert (loss.item(), count.item()) == (pytest.approx(expected, abs=0.01), 4)
    assert one.reader().losses(None, one.batch([("a", "X"), ("b", "X")]))[0].item() == 0


@given(
    count=st.integers(2, 9), size=st.integers(2, 4), steps=st.integers(1, 5), accumulate=st.integers(1, 2), seed=st.integers(0)
)
def test_pairs_are_drawn_in_turn(count: int, size: int, steps: int, accumulate: int, seed: int) -> None:
    """None comes again before all have come."""
    made = drawn(count, Local((0.1,) * steps, size, accumulate), seed)
    assert [[len(some) for some in step] for step in made] == [[size] * accumulate] * steps
    order = [i for step in made for some in step for i in some]
    for begin in range(0, len(order), count):
        turn = order[begin : begin + count]
        assert len(set(turn)) == len(turn)
        assert set(turn) <= set(range(count))
    assert made == drawn(count, Local((0.1,) * steps, size, accumulate), seed)


@trainers
def test_another_program_gives_the_same_vectors_of_what_is_exported(made: str, tmp_path: Path, kind: str) -> None:
    from sentence_transformers import SentenceTransformer

    one = learner.learner(made, TRAINERS[kind])
    tensors = moved(one.initial(7), by=0.5 if kind in ("ia3", "vera") else 0.05)
    found = one.embedder(tensors)
    export(one, tensors, tmp_path / "trained")
    theirs, ours = SentenceTransformer(str(tmp_path / "trained")), embedding.load(str(tmp_path / "trained"))
    assert np.abs(theirs.encode_query(TEXTS) - unit(found.questions(TEXTS))).max() < 1e-4
    assert np.abs(unit(ours.passages(TEXTS)) - unit(found.passages(TEXTS))).max() < 1e-4
    before = unit(one.embedder({}).passages(TEXTS))
    assert np.abs(before - unit(found.passages(TEXTS))).max() > 1e-3
    assert np.array_equal(before, unit(embedding.load(made).passages(TEXTS))), "the resident has learnt nothing"


def test_what_the_means_of_factors_miss_is_exported_too(made: str, tmp_path: Path) -> None:
    """LoRA's `exact` makes the factors wider: rank 3 in place of 2."""
    one = learner.learner(made, Lora(rank=2, combine="exact"))
    dice = torch.Generator().manual_seed(4)
    tensors = {
        n: torch.cat([t, 0.1 * torch.randn(*((1, t.shape[1]) if ".lora_A." in n else (t.shape[0], 1)), generator=dice)], dim=axis)
        for n, t in moved(one.initial(7)).items()
        for axis in [0 if ".lora_A." in n else 1]
    }
    export(one, tensors, tmp_path)
    found = unit(one.embedder(tensors).passages(TEXTS))
    assert np.abs(unit(embedding.load(str(tmp_path)).passages(TEXTS)) - found).max() < 1e-4


def test_two_trainers_on_one_embedder(made: str) -> None:
    """What was learnt by one stays what it is while another is used, and the base is loaded once."""
    one, other = learner.learner(made, TRAINERS["lora"]), learner.learner(made, TRAINERS["full"])
    assert one.resident is other.resident
    first, second = (each.embedder(moved(each.initial(7))) for each in (one, other))
    before = first.questions(TEXTS), second.questions(TEXTS)
    assert not np.array_equal(*before)
    assert np.array_equal(first.questions(TEXTS), before[0])
    assert np.array_equal(second.questions(TEXTS), before[1])


def test_an_embedder_without_prompts_or_a_pooling_of_its_own(
    resident_of: Callable[[str], Resident], tmp_path: Path
) -> None:
    folder = bare(resident_of("bert"), tmp_path / "bare")
    one = learner.learner(folder, TRAINERS["lora"])
    tensors = moved(one.initial(7))
    export(one, tensors, tmp_path / "trained")
    found = unit(one.embedder(tensors).questions(TEXTS[:2]))
    assert np.abs(unit(embedding.load(str(tmp_path / "trained")).questions(TEXTS[:2])) - found).max() < 1e-4


@pytest.mark.parametrize(
    ("trainer", "why"),
    [
        (Lora(batch_size=1), "batch_size = 1 leaves a question no other passage"),
        (BitFit(), "what bitfit trains is not merged into"),
        (SoftPrompt(virtual_tokens=2), "what soft_prompt trains is not merged into"),
        (Head(), "what head trains is not merged into"),
        (Prefix(), "trainer"),
    ],
)
def test_trainers_that_cannot_train_it(made: str, trainer: Averaging, why: str) -> None:
    with pytest.raises(UserError, match=why):
        learner.learner(made, trainer)


def test_an_embedder_that_is_no_transformer(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import PreTrainedTokenizerFast

    from fedtailor.tiny import byte_tokenizer

    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    words = StaticEmbedding(tokenizer._tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words]).save_pretrained(str(tmp_path), create_model_card=False)
    with pytest.raises(UserError, match="begins with a StaticEmbedding, and what is trained is a transformer"):
        learner.learner(str(tmp_path), Lora())
