"""Trainable tensors on a frozen base: names, the one forward, the loss, dropout, batches of several silos."""

from __future__ import annotations

import math

import pytest
import torch

from fedtailor.answering import Encoded, batch, fresh
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident
from fedtailor.tuned import IGNORED, Batch, Tensors, Tuned, stack

METHODS = [Prefix(virtual_tokens=4), Prefix(virtual_tokens=4, projection=True, projection_size=8), Lora(rank=2), Full()]


def moved(tuned: Tuned, by: float = 0.05) -> Tensors:
    """Tensors that are not where the module has them."""
    dice = torch.Generator().manual_seed(3)
    return {n: t + by * torch.randn(t.shape, generator=dice) for n, t in tuned.tensors().items()}


def some(resident: Resident) -> Batch:
    items = [Encoded([1, 2, 3], [4]), Encoded([5, 6, 7, 8, 9], [10, 11])]
    made = batch(items, 256)
    if resident.classifier:
        return Batch(made.input_ids, made.attention_mask, made.position_ids, torch.tensor([0, 1]))
    return made


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}{getattr(m, 'projection', '')}")
def test_using_computes_with_the_tensors_and_leaves_the_module_alone(any_resident: Resident, method: object) -> None:
    tuned = method.put_on(any_resident, 2)  # type: ignore[attr-defined]
    before = {n: p.clone() for n, p in tuned.named_parameters()}
    mine = moved(tuned)
    own, _ = tuned.losses(None, some(any_resident))
    others, _ = tuned.losses(mine, some(any_resident))
    assert not torch.equal(own, others)
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    # the same tensors put into the module by hand
    parameters = {n.removeprefix("inner."): p for n, p in tuned.named_parameters()}
    with torch.no_grad():
        for n, t in mine.items():
            parameters[n].copy_(t)
        try:
            again, _ = tuned.losses(None, some(any_resident))
        finally:
            for n, p in tuned.named_parameters():
                p.copy_(before[n])
    assert torch.equal(others, again)


def test_names_are_the_adapters_own(llama: Resident, bert: Resident) -> None:
    assert Prefix(virtual_tokens=4).put_on(llama, 0).names() == ("prompt_encoder.default.embedding.weight",)
    projected = Prefix(virtual_tokens=4, projection=True).put_on(llama, 0).names()
    assert len(projected) == 5  # the embedding, and weight and bias of two layers
    lora = Lora(rank=2).put_on(llama, 0).names()
    assert len(lora) == 8  # A and B of query and value in two layers
    assert all("lora_A" in n or "lora_B" in n for n in lora)
    assert Lora(rank=2).put_on(bert, 3).names()[-2:] == ("head.weight", "head.bias")
    assert Lora(rank=2).put_on(bert, 3).tensors()["head.bias"].shape == (3,)


def test_full_names_every_weight_once(llama: Resident) -> None:
    tuned = Full().put_on(llama, 0)
    assert "lm_head.weight" not in tuned.names()  # tied to the input embedding
    assert set(tuned.names()) == {n for n, _ in llama.module.named_parameters()}


def test_tied_weights_move_together(llama: Resident) -> None:
    tuned = Full().put_on(llama, 0)
    mine = tuned.tensors()
    mine["model.embed_tokens.weight"][9] *= 3.0  # token 9 is not read below: only its output weights are moved
    batch_ = some(llama).input_ids[:1, -1:], torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 1
    before, after = tuned.using(None, *batch_)[0], tuned.using(mine, *batch_)[0]
    assert torch.allclose(after[..., 9], 3 * before[..., 9], atol=1e-5)
    assert torch.equal(after[..., :9], before[..., :9])


def test_tensors_are_copies_in_fp32(llama: Resident) -> None:
    tuned = Lora(rank=2).put_on(llama, 0)
    first = tuned.tensors()
    next(iter(first.values())).fill_(7)
    assert all(t.dtype == torch.float32 for t in first.values())
    assert not any(bool((t == 7).any()) for t in tuned.tensors().values())


def test_the_loss_is_that_of_plain_logits(causal: Resident) -> None:
    """Row by row, without padding, from all logits."""
    tuned = fresh(causal).tuned
    nll, places = tuned.losses(None, some(causal))
    expected = 0.0
    for prompt, answer in (([1, 2, 3], [4]), ([5, 6, 7, 8, 9], [10, 11])):
        with torch.no_grad():
            logp = causal.module(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected -= sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
    assert places.item() == 3
    assert nll.item() == pytest.approx(expected, abs=1e-4)


def test_an_encoder_pools_the_mean_over_its_tokens(bert: Resident) -> None:
    tuned = fresh(bert, classes=2).tuned
    weight, bias = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, -0.5])
    tensors = tuned.tensors() | {"head.weight": weight, "head.bias": bias}
    nll, rows = tuned.losses(tensors, some(bert))
    expected = 0.0
    for ids, label in (([1, 2, 3, 4], 0), ([5, 6, 7, 8, 9, 10, 11], 1)):
        with torch.no_grad():
            pooled = bert.module(torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected -= (weight @ pooled + bias).log_softmax(-1)[label].item()
    assert rows.item() == 2
    assert nll.item() == pytest.approx(expected, abs=1e-4)


def test_a_new_head_says_that_all_labels_are_equally_likely(bert: Resident) -> None:
    nll, rows = fresh(bert, classes=4).tuned.losses(None, some(bert))
    assert nll.item() / rows.item() == pytest.approx(math.log(4))


def test_dropout_comes_from_its_seed_alone(llama: Resident) -> None:
    tuned = Lora(rank=2, dropout=0.5).put_on(llama, 0)
    mine = moved(tuned)

    def loss(seed: int) -> torch.Tensor:
        with tuned.dropping(seed):
            return tuned.losses(mine, some(llama))[0].detach()

    torch.manual_seed(8)
    expected = torch.rand(2)
    torch.manual_seed(8)
    first = loss(1)
    assert torch.equal(torch.rand(2), expected), "the caller's dice were used"
    torch.manual_seed(9)
    assert torch.equal(loss(1), first)
    assert not torch.equal(loss(2), first)
    off = tuned.losses(mine, some(llama))[0]
    assert torch.equal(off, tuned.losses(mine, some(llama))[0]), "dropout is still on"
    assert not torch.equal(off, first)


def test_dropping_ends_with_an_error_too(llama: Resident) -> None:
    tuned = Lora(rank=2, dropout=0.5).put_on(llama, 0)
    with pytest.raises(RuntimeError, match="inside"), tuned.dropping(1):
        raise RuntimeError("inside")
    assert not any(m.training for m in tuned.modules())


def test_a_prefix_takes_places(llama: Resident) -> None:
    assert Prefix(virtual_tokens=4).put_on(llama, 0).shift == 4
    assert Lora(rank=2).put_on(llama, 0).shift == 0
    assert fresh(llama).tuned.shift == 0


def test_stack_pads_on_the_left() -> None:
    short, long = batch([Encoded([1], [2])], 9), batch([Encoded([3, 4], [5, 6])], 9)
    both = stack([short, long], 9)
    assert both.input_ids.tolist() == [[[9, 9, 1, 2]], [[3, 4, 5, 6]]]
    assert both.attention_mask.tolist() == [[[0, 0, 1, 1]], [[1, 1, 1, 1]]]
    assert both.position_ids.tolist() == [[[0, 0, 0, 1]], [[0, 1, 2, 3]]]
    assert both.labels.tolist() == [[[IGNORED, 2]], [[5, 6]]]


def test_stack_leaves_classes_as_they_are() -> None:
    rows = Batch(torch.tensor([[1, 2]]), torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([1]))
    assert stack([rows, rows], 0).labels.tolist() == [[1], [1]]
