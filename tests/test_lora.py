"""LoRA: starts as the base, trains low-rank changes, a silo may have a lower rank, plain PEFT loads the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor.answering import fresh
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.methods.averaging import Adapted, Begin, Train, Trained, start, train, train_many
from fedtailor.methods.lora import Lora
from fedtailor.models import Resident
from fedtailor.tuned import Tensors

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])


def begun(base: Resident, method: Lora, seed: int = 0, labels: int = 0) -> Tensors:
    return method.initial(base, method.put_on(base, labels), seed)


def logits(base: Resident, method: Lora, tensors: Tensors) -> torch.Tensor:
    model = Adapted(method, tensors).open({"base": base})
    with torch.no_grad():
        places = torch.arange(IDS.shape[1]).expand_as(IDS)
        return model.tuned.using(model.tensors, IDS, torch.ones_like(IDS), places, IDS.shape[1])[0]  # type: ignore[no-any-return]


def moved(tensors: Tensors) -> Tensors:
    dice = torch.Generator().manual_seed(2)
    return {n: t + 0.3 * torch.randn(t.shape, generator=dice) for n, t in tensors.items()}


def test_it_starts_as_the_base(causal: Resident) -> None:
    method, rows = Lora(rank=2), [Row("abc", "d"), Row("a longer one", "e")]
    expected = fresh(causal).logprobs(rows)
    tensors = begun(causal, method)
    assert Adapted(method, tensors).open({"base": causal}).logprobs(rows) == expected
    assert all(not t.any() for n, t in tensors.items() if ".lora_B." in n)
    for n, t in tensors.items():
        if ".lora_A." in n:
            bound = t.shape[1] ** -0.5
            assert 0.5 * bound < t.abs().max() <= bound
            assert t.min() < 0 < t.max()


def test_the_start_is_seeded(llama: Resident) -> None:
    method = Lora(rank=2)
    torch.manual_seed(1)
    first = begun(llama, method, 1)
    torch.manual_seed(2)
    assert all(torch.equal(t, first[n]) for n, t in begun(llama, method, 1).items())
    assert any(not torch.equal(t, first[n]) for n, t in begun(llama, method, 2).items())


def test_the_change_is_scale_times_b_a(causal: Resident, plain: Callable[[str], Any]) -> None:
    """The same logits by adding the product to the weights of a base read anew."""
    method = Lora(rank=2, scale=1.5)
    tensors = moved(begun(causal, method))
    module = plain(causal.module.config.model_type)
    weights = dict(module.named_parameters())
    count = 0
    with torch.no_grad():
        for n, a in tensors.items():
            if ".lora_A." not in n:
                continue
            change = 1.5 * tensors[n.replace(".lora_A.", ".lora_B.")] @ a
            weight = weights[n.removeprefix("base_model.model.").replace("lora_A.default.", "")]
            weight += change.T if module.config.model_type == "gpt2" else change  # gpt2 stores (in, out)
            count += 1
        expected = module(IDS).logits
    assert count == len(tensors) // 2 > 0
    assert torch.allclose(logits(causal, method, tensors), expected, atol=1e-4)


def test_targets_and_rank_decide_the_shapes(llama: Resident) -> None:
    tensors = begun(llama, Lora(rank=3, targets=("down_proj",)))
    shapes = {n.split(".")[-3]: tuple(t.shape) for n, t in tensors.items()}
    assert shapes == {"lora_A": (3, 64), "lora_B": (32, 3)}
    assert len(tensors) == 4
    assert all("down_proj" in n for n in tensors)


def test_plain_peft_loads_the_export(
    causal: Resident, plain: Callable[[str], Any], tmp_path: Path, written: Mapping[str, SiloData]
) -> None:
    from peft import PeftModel

    method = Lora(rank=2, lr=0.05, local_steps=4, batch_size=2)
    silo = Silo("zoo", written["zoo"], {"base": causal}, 3)
    tensors = start(silo, Begin(method)).tensors
    delta = train(silo, Train(method, tensors, method.lrs(1, 1))).delta
    tensors = {n: t + delta[n] for n, t in tensors.items()}
    method.export(causal, tensors, tmp_path)
    module = plain(causal.module.config.model_type)
    with torch.no_grad():
        bare = module(IDS).logits
        theirs = PeftModel.from_pretrained(module, tmp_path).eval()(IDS).logits
    assert torch.allclose(theirs, logits(causal, method, tensors), atol=1e-4)
    assert (theirs - bare).abs().max() > 1e-2


def test_an_encoders_export(bert: Resident, plain: Callable[[str], Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    method = Lora(rank=2)
    tensors = moved(begun(bert, method, labels=2))
    method.export(bert, tensors, tmp_path)
    scores = Adapted(method, tensors, 2).open({"base": bert}).scores([Row("The tea was cold.", "a")], ["a", "b"])
    ids = torch.tensor([bert.tokenizer("The tea was cold.").input_ids])
    adapted = PeftModel.from_pretrained(plain("bert"), tmp_path).eval()
    head = load_file(tmp_path / "head.safetensors")
    with torch.no_grad():
        pooled = adapted(input_ids=ids).last_hidden_state.mean(1)
    assert torch.allclose(scores, (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1), atol=1e-4)


def test_a_silo_of_lower_rank_leaves_the_rest_alone(causal: Resident, written: Mapping[str, SiloData]) -> None:
    method = Lora(rank=4, local_steps=3, batch_size=2, lr=0.01)
    data = {**written, "shop": replace(written["shop"], settings={"rank": 1})}
    silos = [Silo(n, d, {"base": causal}, 3) for n, d in data.items()]
    body = Train(method, moved(start(silos[0], Begin(method)).tensors), method.lrs(1, 1))
    cafe, shop, _ = train_many(silos, body)
    assert isinstance(cafe, Trained)
    assert isinstance(shop, Trained)
    assert shop.problem(body) is None
    for n, d in shop.delta.items():
        mine, rest = (d[:1], d[1:]) if ".lora_A." in n else (d[:, :1], d[:, 1:])
        assert torch.equal(rest, torch.zeros_like(rest))
        assert mine.abs().max() > 0
        full = cafe.delta[n]
        assert (full[1:] if ".lora_A." in n else full[:, 1:]).abs().max() > 0
    # as if the method were of rank 1
    cut = {n: t[:1] if ".lora_A." in n else t[:, :1] for n, t in body.tensors.items()}
    alone = train(Silo("shop", written["shop"], {"base": causal}, 3), Train(replace(method, rank=1), cut, body.lrs))
    for n, d in alone.delta.items():
        assert torch.allclose(d, shop.delta[n][tuple(slice(k) for k in d.shape)], atol=1e-6)


def test_dropout_takes_the_plain_step_and_is_seeded(llama: Resident, written: Mapping[str, SiloData]) -> None:
    method = Lora(rank=2, dropout=0.5, local_steps=2, batch_size=2)
    silo = lambda: Silo("zoo", written["zoo"], {"base": llama}, 3)  # noqa: E731
    body = Train(method, moved(start(silo(), Begin(method)).tensors), method.lrs(1, 1))
    assert method.dropping
    torch.manual_seed(1)
    first = train(silo(), body).delta
    torch.manual_seed(2)
    assert all(torch.equal(d, first[n]) for n, d in train(silo(), body).delta.items())


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
def test_dropout_is_a_fraction(wrong: float) -> None:
    from pydantic import TypeAdapter, ValidationError

    with pytest.raises(ValidationError, match="dropout"):
        TypeAdapter(Lora).validate_python({"dropout": wrong})
