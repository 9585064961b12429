"""Layers that are not there, and ranks that do not fit, are told with what there is."""

from __future__ import annotations

from typing import Any

import pytest

from fedtailor import find
from fedtailor.errors import UserError
from fedtailor.methods.lora import Lora
from fedtailor.models import Resident


@pytest.mark.parametrize("name", ["lora", "vera", "ia3"])
def test_a_layer_that_is_not_there(llama: Resident, name: str) -> None:
    method: Any = find.method(name)(targets=("q_proy",))
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    said = rf"targets = 'q_proy': no layer of LlamaForCausalLM is called so; did you mean 'q_proj'\? .choices: {known}."
    with pytest.raises(UserError, match=said):
        method.put_on(llama, 0)


def test_layers_are_found_by_the_end_of_their_name(llama: Resident) -> None:
    names = Lora(rank=2, targets=("self_attn.q_proj", "model.layers.1.mlp.up_proj")).put_on(llama, 0).names()
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in names}
    assert layers == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


def test_a_rank_beyond_the_layer(llama: Resident) -> None:
    Lora(rank=16).put_on(llama, 0)  # v_proj is 16 wide
    with pytest.raises(UserError, match=r"rank = 17: model\.layers\.0\.self_attn\.v_proj has 16 numbers on a side; choose 16"):
        Lora(rank=17).put_on(llama, 0)


def test_every_linear_layer_of_the_blocks(llama: Resident) -> None:
    names = Lora(rank=2, targets=("all-linear",)).put_on(llama, 0).names()
    assert len(names) == 2 * 7 * 2


@pytest.mark.parametrize(("target", "said"), [("", "targets = '': no layer"), ("self_attn", r"name some in it: \['k_proj', 'o_")])
def test_what_is_no_layer_for_an_adapter(llama: Resident, target: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        Lora(targets=(target,)).put_on(llama, 0)
    assert "\n" not in str(told.value)


def test_feedforward_layers_of_ia3(llama: Resident) -> None:
    """Those scale their input: up_proj's is 32 wide, its output 64."""
    ia3: Any = find.method("ia3")

    def layers(**settings: Any) -> dict[str, int]:
        tensors = ia3(**settings).put_on(llama, 0).tensors()
        return {n.split(".ia3_l")[0].rpartition(".")[2]: t.numel() for n, t in tensors.items()}

    wide = llama.module.config.hidden_size
    assert set(layers()) == {"k_proj", "v_proj", "down_proj"}
    given = layers(feedforward=("up_proj",))
    assert set(given) == {"k_proj", "v_proj", "up_proj"}
    assert given["up_proj"] == wide
    assert set(layers(targets=("k_proj",), feedforward=("down_proj",))) == {"k_proj", "down_proj"}
