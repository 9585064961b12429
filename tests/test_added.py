"""What our own hooks put on a base, and the folders that others load it from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import added, find
from fedtailor.data import Row
from fedtailor.errors import UserError
from fedtailor.methods.adapter import Adapter
from fedtailor.methods.averaging import Adapted, Averaging
from fedtailor.methods.bitfit import BitFit
from fedtailor.methods.head import Head
from fedtailor.models import Resident
from fedtailor.tuned import Tensors

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])
OWN = {"bitfit": BitFit(), "adapter": Adapter(size=3)}
PEFTS = ("ia3", "layernorm", "vera", "soft_prompt", "p_tuning", "peft")


def moved(tensors: Tensors) -> Tensors:
    dice = torch.Generator().manual_seed(2)
    return {n: t + 0.3 * torch.randn(t.shape, generator=dice) for n, t in tensors.items()}


def begun(base: Resident, method: Averaging, labels: int = 0) -> Tensors:
    return method.initial(base, method.put_on(base, labels), 1)


def logits(base: Resident, method: Averaging, tensors: Tensors | None) -> torch.Tensor:
    model = Adapted(method, tensors or {}).open({"base": base})
    with torch.no_grad():
        places = torch.arange(IDS.shape[1]).expand_as(IDS)
        found: torch.Tensor = model.tuned.using(model.tensors, IDS, torch.ones_like(IDS), places, IDS.shape[1])[0]
    return found


def test_blocks_and_layers_are_found(resident_of: Callable[[str], Resident]) -> None:
    llama, gpt2, bert = (resident_of(name).plan for name in ("llama", "gpt2", "bert"))
    assert added.blocks(llama) == ("model.layers.0", "model.layers.1")
    assert added.blocks(gpt2) == ("transformer.h.0", "transformer.h.1")
    assert added.blocks(bert) == ("encoder.layer.0", "encoder.layer.1")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert added.linear(llama)[:4] == tuple(f"model.layers.0.{part}" for part in parts)
    assert len(added.linear(llama)) == 2 * 7
    assert len(added.linear(gpt2)) == 2 * 4
    assert added.norms(bert) == ("LayerNorm",)
    assert added.norms(llama) == ("input_layernorm", "norm", "post_attention_layernorm")


@pytest.mark.parametrize("name", [*OWN, "ia3", "layernorm", "vera", "peft"])
def test_it_starts_as_the_base(causal: Resident, name: str) -> None:
    method = OWN.get(name) or find.method(name)()
    bare = torch.as_tensor(causal.tuned()(IDS, torch.ones_like(IDS), torch.arange(7).expand_as(IDS), 7)[0])
    tensors = begun(causal, method)
    assert torch.allclose(logits(causal, method, tensors), bare, atol=1e-6)
    assert (logits(causal, method, moved(tensors)) - bare).abs().max() > 1e-2


def test_an_offset_is_a_bias(plain: Callable[[str], Any], gpt2: Resident) -> None:
    """By adding it to the biases of a base read anew."""
    tensors = moved(begun(gpt2, BitFit()))
    module = plain("gpt2")
    with torch.no_grad():
        for name, offset in tensors.items():
            module.get_submodule(name.removeprefix("added.").replace("/", ".")).bias += offset
        expected = module(IDS).logits
    assert torch.allclose(logits(gpt2, BitFit(), tensors), expected, atol=1e-5)


def test_a_bottleneck_by_hand() -> None:
    h, eye = torch.tensor([[1.0, -2.0]]), torch.eye(2)
    # down: (1, -2) + (0, 1) -> relu -> (1, 0); up: twice, + (5, 5)
    out = added.bottleneck(h, eye, torch.tensor([0.0, 1.0]), 2 * eye, torch.tensor([5.0, 5.0]))
    assert out.tolist() == [[1 + 2 + 5, -2 + 0 + 5]]


def loaded(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", OWN)
def test_the_folder_brings_its_own_loader(
    causal: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    method = OWN[name]
    tensors = moved(begun(causal, method))
    method.export(causal, tensors, tmp_path)
    module = loaded(tmp_path).load(plain(causal.module.config.model_type), tmp_path)
    with torch.no_grad():
        assert torch.allclose(module(IDS).logits, logits(causal, method, tensors), atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["added.safetensors", "load.py"]


@pytest.mark.parametrize("name", PEFTS)
def test_plain_peft_loads_the_others(causal: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    method = find.method(name)()
    tensors = moved(begun(causal, method))
    method.export(causal, tensors, tmp_path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(causal.module.config.model_type), tmp_path).eval()(IDS).logits
    assert torch.allclose(theirs[:, -IDS.shape[1] :], logits(causal, method, tensors), atol=1e-4)


def test_a_head_alone_is_logistic_regression_on_the_bases_features(
    bert: Resident, plain: Callable[[str], Any], tmp_path: Path, llama: Resident
) -> None:
    from safetensors.torch import load_file

    tensors = moved(begun(bert, Head(), 2))
    assert set(tensors) == {"head.weight", "head.bias"}
    Head().export(bert, tensors, tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    ids = torch.tensor([bert.tokenizer("The tea was cold.").input_ids])
    with torch.no_grad():
        pooled = plain("bert")(input_ids=ids).last_hidden_state.mean(1)
    scores = Adapted(Head(), tensors, 2).open({"base": bert}).scores([Row("The tea was cold.", "a")], ["a", "b"])
    assert torch.allclose(scores, (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1), atol=1e-5)
    with pytest.raises(UserError, match="head needs an encoder"):
        Head().put_on(llama, 0)


def test_any_adapter_of_peft_or_none(llama: Resident) -> None:
    from fedtailor.methods.peft import Peft

    tensors = begun(llama, Peft(type="loha", settings={"r": 2, "target_modules": ["q_proj"]}))
    assert all("hada" in name for name in tensors)
    assert len(tensors) == 2 * 4
    with pytest.raises(UserError, match=r"type = 'lohaa': PEFT has no such adapter; did you mean 'loha'\?"):
        Peft(type="lohaa").put_on(llama, 0)
    with pytest.raises(UserError, match=r"settings of 'loha': .*unexpected keyword argument 'rank'"):
        Peft(type="loha", settings={"rank": 2}).put_on(llama, 0)
