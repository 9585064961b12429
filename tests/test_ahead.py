"""What our own hooks put in front: equal to what a cache holds, taken off cleanly, and loaded by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import ahead
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.errors import UserError
from fedtailor.images import look_of
from fedtailor.methods.averaging import Adapted, Averaging, Train, train
from fedtailor.methods.prefix import WEIGHT, Prefix
from fedtailor.methods.soft_prompt import SoftPrompt
from fedtailor.models import Resident, resident
from test_added import begun, loaded, moved

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])


def test_attentions_are_found(bert: Resident, gpt2: Resident, vit: Resident) -> None:
    assert ahead.attentions(vit.plan) == ("layers.0.attention", "layers.1.attention")
    assert ahead.attentions(bert.plan) == ("encoder.layer.0.attention.self", "encoder.layer.1.attention.self")
    assert ahead.attentions(gpt2.plan) == ()  # one layer makes all three


def test_keys_in_front_are_what_a_cache_holds(bert: Resident) -> None:
    """PEFT's prefix goes in as a key/value cache. The same numbers by our hooks give the same states, padding included."""
    peft = Prefix(virtual_tokens=3).put_on(bert, 2)
    weight = torch.randn(3, 2 * 2 * 32, generator=torch.Generator().manual_seed(1))  # two layers' keys and values
    head = {"head.weight": torch.eye(2, 32), "head.bias": torch.zeros(2)}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = peft.using({WEIGHT: weight, **head}, IDS, mask, places, 0)[0]
    ours = bert.tuned(ahead.Keys(ahead.attentions(bert.plan), 3), 2)
    parts = weight.view(3, 4, 32)
    mine = {
        f"added.encoder/layer/{i}/attention/self/{part}": parts[:, 2 * i + j]
        for i in range(2)
        for j, part in enumerate(("key", "value"))
    }
    assert set(mine) == {n for n in ours.names() if n[:5] != "head."}
    found = ours.using({**mine, **head}, IDS, mask, places + 3, 0)[0]
    assert torch.allclose(found, expected, atol=1e-6)
    bare = bert.tuned(None, 2).using(head, IDS, mask, places + 3, 0)[0]
    assert (found - bare).abs().max() > 1e-2


def test_in_front_with_a_float_mask_and_a_bias() -> None:
    key = torch.zeros(2, 4, 5, 8)
    mask, bias = torch.full((2, 1, 1, 5), -9.0), torch.full((1, 4, 3, 5), 7.0)
    keys, values, seen, bias = ahead.in_front(key, key, mask, bias, torch.ones(2, 32), 2 * torch.ones(2, 32))
    assert keys[1, 3, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert values[1, 3, :, 0].tolist() == [2, 2, 0, 0, 0, 0, 0]
    assert seen[1, 0, 0].tolist() == [0, 0, -9, -9, -9, -9, -9]
    assert bias[0, 1, 2].tolist() == [0, 0, 7, 7, 7, 7, 7]
    assert ahead.in_front(key, key, mask > 0, None, torch.ones(2, 32), torch.ones(2, 32))[2][0, 0, 0].tolist()[:3] == [1, 1, 0]


@pytest.mark.parametrize("method", [Prefix(virtual_tokens=3), SoftPrompt(virtual_tokens=3)], ids=["prefix", "soft_prompt"])
def test_the_folder_brings_its_own_loader(
    vit: Resident, plain: Callable[[str], Any], pictured: Mapping[str, SiloData], tmp_path: Path, method: Averaging
) -> None:
    """Loaded on plain transformers, a head on the mean over the picture's own places tells the same."""
    from safetensors.torch import load_file

    tensors = moved(begun(vit, method, 2))
    method.export(vit, tensors, tmp_path)
    rows, labels = pictured["zoo"].test, pictured["zoo"].labels
    scores = Adapted(method, tensors, 2).open({"base": vit}).scores(rows, labels)
    module, head = loaded(tmp_path).load(plain("vit"), tmp_path), load_file(tmp_path / "head.safetensors")
    values = torch.stack([torch.tensor(list(row.image.data)).view(1, 28, 28) for row in rows if row.image])
    with torch.no_grad():
        hidden = module((values / 255 - 0.5) / 0.5).last_hidden_state
    own = torch.cat([hidden[:, :1], hidden[:, -16:]], dim=1)  # the class token and 16 patches
    assert hidden.shape[1] == 17 + 3 * isinstance(method, SoftPrompt)
    logits = own.mean(1) @ head["head.weight"].T + head["head.bias"]
    assert torch.allclose(scores, logits.log_softmax(-1), atol=1e-5)
    bare = Adapted(method, {**begun(vit, method, 2), **{f"head.{n[5:]}": t for n, t in head.items()}}, 2).open({"base": vit})
    assert (bare.scores(rows, labels) - scores).abs().max() > 1e-3


def test_it_comes_off(vit: Resident) -> None:
    Prefix(virtual_tokens=3).put_on(vit, 2)
    assert all("_in_front" in layer.__dict__ for n, layer in vit.module.named_modules() if n.endswith("attention"))
    vit.tuned()
    assert not any("_in_front" in layer.__dict__ for layer in vit.module.modules())


def test_a_vision_prefix_is_flat(vit: Resident) -> None:
    with pytest.raises(UserError, match=r"projection: a vision model takes a flat prefix; set method\.projection = false"):
        Prefix(projection=True).put_on(vit, 2)


def test_bases_that_take_nothing_in_front() -> None:
    """Found as it is put on, not as a round that trains nothing."""
    import transformers

    sizes: dict[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 1, "embed_dim": 16, "depths": [1, 1]}
    swin: Any = transformers.SwinModel(transformers.SwinConfig(**sizes, num_heads=[2, 2], window_size=2), add_pooling_layer=False)
    base = resident(swin, None, source="swin", kind="vision", look=look_of(swin.config))
    with pytest.raises(UserError, match=r"SwinModel takes nothing in front of its own: .*attention.* does not call"):
        Prefix(virtual_tokens=3).put_on(base, 2)
    with pytest.raises(UserError, match=r"SwinModel takes nothing in front of its own: Sizes of tensors"):
        SoftPrompt(virtual_tokens=3).put_on(base, 2)
    assert base.tuned(None, 2)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).shape == (1, 2)


@pytest.mark.parametrize("method", [Prefix(virtual_tokens=4), SoftPrompt(virtual_tokens=4)], ids=["prefix", "soft_prompt"])
def test_a_silo_with_fewer_trains_the_first(vit: Resident, pictured: Mapping[str, SiloData], method: Averaging) -> None:
    method = replace(method, local_steps=2, batch_size=2)
    start = moved(begun(vit, method, 2))
    body, few = Train(method, start, (1e-3, 1e-3)), replace(pictured["zoo"], settings={"virtual_tokens": 2})
    own = train(Silo("zoo", few, {"base": vit}, 3), body)
    assert own.problem(body) is None
    small = replace(method, virtual_tokens=2)  # type: ignore[call-arg]
    cut = {n: t[:2] if n.startswith("added.") else t for n, t in start.items()}
    alone = train(Silo("zoo", pictured["zoo"], {"base": vit}, 3), Train(small, cut, body.lrs))
    for name, delta in own.delta.items():
        if name.startswith("added."):
            assert delta[2:].abs().max() == 0
            assert delta[:2].abs().max() > 0
            assert torch.allclose(delta[:2], alone.delta[name], atol=1e-7)
