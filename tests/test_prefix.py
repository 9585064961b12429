"""Prefix-tuning: a text's keys and values are that text; the MLP starts as them; the export is what plain PEFT loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor.answering import Answers, fresh
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.errors import UserError
from fedtailor.methods.averaging import Adapted, Begin, Train, Trained, start, train, train_many
from fedtailor.methods.prefix import WEIGHT, Prefix
from fedtailor.models import Resident
from fedtailor.tuned import Tensors

TEXT = "Say it in a few words."
ROWS = [Row("The tea was cold.", "bad"), Row("A", "so it is"), Row("Something longer to be read:", "yes")]
IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])


def begun(base: Resident, method: Prefix, seed: int = 0, labels: int = 0) -> Tensors:
    return method.initial(base, method.put_on(base, labels), seed)


def opened(base: Resident, method: Prefix, tensors: Tensors) -> Answers:
    return Adapted(method, tensors).open({"base": base})


def logits(model: Answers) -> torch.Tensor:
    with torch.no_grad():
        places = torch.arange(IDS.shape[1]).expand_as(IDS)
        return model.tuned.using(model.tensors, IDS, torch.ones_like(IDS), places, IDS.shape[1])[0]  # type: ignore[no-any-return]


def in_plain_peft(module: Any, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        adapted = PeftModel.from_pretrained(module, folder).eval()
        return adapted(IDS, attention_mask=torch.ones_like(IDS)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("projection", [False, True])
def test_the_prefix_of_a_text_is_that_text_in_front(causal: Resident, projection: bool) -> None:
    method = Prefix(virtual_tokens=len(TEXT), init_text=TEXT, projection=projection, projection_size=64)
    model = opened(causal, method, begun(causal, method))
    told = [replace(row, prompt=TEXT + row.prompt) for row in ROWS]
    bare = fresh(causal)
    expected, without = torch.tensor(bare.logprobs(told)), torch.tensor(bare.logprobs(ROWS))
    model = opened(causal, method, model.tensors or {})
    atol = 1e-3 if projection else 2e-5
    assert torch.allclose(torch.tensor(model.logprobs(ROWS)), expected, atol=atol)
    assert not torch.allclose(without, expected, atol=10 * atol), "the text has no effect: nothing is shown"
    assert model.generate(ROWS) == fresh(causal).generate(told)


def test_a_short_text_is_repeated_and_a_long_one_is_cut(llama: Resident) -> None:
    repeated = begun(llama, Prefix(virtual_tokens=8, init_text="abc"))[WEIGHT]
    written = begun(llama, Prefix(virtual_tokens=8, init_text="abcabcab"))[WEIGHT]
    assert torch.equal(repeated, written)
    cut = begun(llama, Prefix(virtual_tokens=2, init_text="abc"))[WEIGHT]
    assert torch.allclose(cut, written[:2], atol=1e-6), "earlier tokens do not see later ones"
    assert not torch.allclose(written[:3], written[3:6], atol=1e-3), "a repeated token stands in another place"


def test_shapes(llama: Resident, gpt2: Resident) -> None:
    # layers x (key and value) x heads x width of a head; llama has 2 key-value heads of width 8, gpt2 4 of 8
    assert begun(llama, Prefix(virtual_tokens=5))[WEIGHT].shape == (5, 2 * 2 * 2 * 8)
    assert begun(gpt2, Prefix(virtual_tokens=5))[WEIGHT].shape == (5, 2 * 2 * 4 * 8)


def test_a_projected_prefix_starts_as_the_flat_one(causal: Resident) -> None:
    flat = Prefix(virtual_tokens=6, init_text=TEXT)
    projected = replace(flat, projection=True, projection_size=32)
    wanted, tensors = begun(causal, flat), begun(causal, projected)
    method, collapsed = projected.flat(causal, tensors)
    assert not method.projection
    assert torch.allclose(collapsed[WEIGHT], wanted[WEIGHT], atol=1e-4)
    one = logits(opened(causal, flat, wanted))
    assert torch.allclose(logits(opened(causal, projected, tensors)), one, atol=1e-4)
    assert (logits(fresh(causal)) - one).abs().max() > 1e-2


def test_collapsing_keeps_what_training_changed(causal: Resident) -> None:
    method = Prefix(virtual_tokens=6, projection=True, projection_size=16)
    dice = torch.Generator().manual_seed(2)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=dice) for n, t in begun(causal, method).items()}
    before = logits(opened(causal, method, tensors))
    assert torch.allclose(logits(opened(causal, *method.flat(causal, tensors))), before, atol=1e-4)


def test_the_start_depends_on_the_seed_only_where_it_is_random(llama: Resident) -> None:
    noise = Prefix(virtual_tokens=4, init_text="")
    torch.manual_seed(1)
    first = begun(llama, noise, seed=1)[WEIGHT]
    torch.manual_seed(2)
    assert torch.equal(begun(llama, noise, seed=1)[WEIGHT], first)
    assert not torch.equal(begun(llama, noise, seed=2)[WEIGHT], first)
    text = Prefix(virtual_tokens=4)
    assert torch.equal(begun(llama, text, seed=1)[WEIGHT], begun(llama, text, seed=2)[WEIGHT])
    projected = replace(text, projection=True)
    one, other = begun(llama, projected, 1), begun(llama, projected, 2)
    assert not torch.equal(one[WEIGHT], other[WEIGHT])


def test_an_encoder_starts_with_a_head_that_knows_nothing(bert: Resident) -> None:
    tensors = begun(bert, Prefix(virtual_tokens=4), labels=3)
    assert tensors["head.weight"].shape == (3, 32)
    assert not tensors["head.weight"].any()
    assert tensors[WEIGHT].abs().max() > 0


@pytest.mark.parametrize("projection", [False, True])
def test_plain_peft_loads_the_export(
    causal: Resident, plain: Callable[[str], Any], tmp_path: Path, written: Mapping[str, SiloData], projection: bool
) -> None:
    """After real training, on a base read anew: the logits that serve's model gives."""
    method = Prefix(virtual_tokens=5, projection=projection, projection_size=16, local_steps=4, batch_size=2)
    silos = [Silo(n, d, {"base": causal}, 3) for n, d in written.items()]
    tensors = start(silos[0], Begin(method)).tensors
    delta = train(silos[0], Train(method, tensors, method.lrs(1, 1))).delta
    tensors = {n: t + delta[n] for n, t in tensors.items()}
    served = Adapted(method, tensors)
    method.export(causal, tensors, tmp_path)
    module = plain(causal.module.config.model_type)
    theirs = in_plain_peft(module, tmp_path)
    assert torch.allclose(theirs, logits(served.open({"base": causal})), atol=1e-4)
    with torch.no_grad():
        bare = plain(causal.module.config.model_type)(IDS).logits
    assert (theirs - bare).abs().max() > 1e-2
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_an_encoders_export(bert: Resident, plain: Callable[[str], Any], tmp_path: Path) -> None:
    """The prefix in PEFT's format, the head beside it: mean-pooled states through it are the scores."""
    from peft import PeftModel
    from safetensors.torch import load_file

    method = Prefix(virtual_tokens=5, projection=True, projection_size=16)
    dice = torch.Generator().manual_seed(2)
    start_ = begun(bert, method, labels=2)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=dice) for n, t in start_.items()}
    method.export(bert, tensors, tmp_path)
    scores = Adapted(method, tensors, 2).open({"base": bert}).scores([Row("The tea was cold.", "a")], ["a", "b"])
    ids = torch.tensor([bert.tokenizer("The tea was cold.").input_ids])
    adapted = PeftModel.from_pretrained(plain("bert"), tmp_path).eval()
    head = load_file(tmp_path / "head.safetensors")
    with torch.no_grad():
        pooled = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
    theirs = (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1)
    assert torch.allclose(scores, theirs, atol=1e-4)
    assert (scores[0, 0] - scores[0, 1]).abs() > 1e-2


@pytest.mark.parametrize("projection", [False, True])
def test_a_silo_of_fewer_virtual_tokens_leaves_the_rest_alone(
    llama: Resident, written: Mapping[str, SiloData], projection: bool
) -> None:
    method = Prefix(virtual_tokens=6, local_steps=3, batch_size=2, projection=projection, projection_size=8)
    data = {**written, "shop": replace(written["shop"], settings={"virtual_tokens": 2})}
    silos = [Silo(n, d, {"base": llama}, 3) for n, d in data.items()]
    body = Train(method, start(silos[0], Begin(method)).tensors, method.lrs(1, 1))
    cafe, shop, _ = train_many(silos, body)
    assert isinstance(cafe, Trained)
    assert isinstance(shop, Trained)
    assert shop.delta[WEIGHT].shape == (6, body.tensors[WEIGHT].shape[1])
    assert torch.equal(shop.delta[WEIGHT][2:], torch.zeros_like(shop.delta[WEIGHT][2:]))
    assert shop.delta[WEIGHT][:2].abs().min(dim=1).values.max() > 0
    assert (cafe.delta[WEIGHT][2:].abs().amax(1) > 0).all()
    assert shop.problem(body) is None
    # the silo did train with two: as if the method had only those
    small = replace(method, virtual_tokens=2)
    cut = {n: t[:2] if n == WEIGHT else t for n, t in body.tensors.items()}
    alone = train(Silo("shop", written["shop"], {"base": llama}, 3), Train(small, cut, body.lrs))
    assert torch.allclose(alone.delta[WEIGHT], shop.delta[WEIGHT][:2], atol=1e-6)


def test_too_many_virtual_tokens(any_resident: Resident) -> None:
    with pytest.raises(UserError, match=r"virtual_tokens = 512 leaves no room in a context of 512"):
        Prefix(virtual_tokens=512).put_on(any_resident, 2)


def test_blank_init_text() -> None:
    with pytest.raises(ValueError, match="only white space"):
        Prefix(init_text="  \n")
