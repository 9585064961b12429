"""Full fine-tuning: every weight travels, the base stays, transformers loads what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import training
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.methods.averaging import Adapted, Begin, Train, start, train
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.models import Base, Resident, load
from fedtailor.tiny import tiny
from fedtailor.tuned import Tensors

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])
PLACES = torch.arange(7).expand_as(IDS)


def trained(base: Resident, data: SiloData, method: Full) -> Tensors:
    silo = Silo("zoo", data, {"base": base}, 3)
    tensors = start(silo, Begin(method)).tensors
    delta = train(silo, Train(method, tensors, method.lrs(1, 1))).delta
    assert min(d.abs().max().item() for n, d in delta.items() if "embed" in n or "wte" in n or "norm" in n.lower()) > 0
    return {n: t + delta[n] for n, t in tensors.items()}


def test_it_starts_as_the_base(any_resident: Resident, rated: Mapping[str, SiloData]) -> None:
    tensors = start(Silo("zoo", rated["zoo"], {"base": any_resident}, 3), Begin(Full())).tensors
    for n, p in any_resident.module.named_parameters():
        assert torch.equal(tensors[n], p)
        assert tensors[n].data_ptr() != p.data_ptr()


def test_transformers_loads_the_export(causal: Resident, tmp_path: Path, written: Mapping[str, SiloData]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method = Full(lr=1e-3, local_steps=3, batch_size=2)
    before = {n: t.clone() for n, t in causal.module.state_dict().items()}
    tensors = trained(causal, written["zoo"], method)
    model = Adapted(method, tensors).open({"base": causal})
    method.export(causal, tensors, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    with torch.no_grad():
        ours = model.tuned.using(tensors, IDS, torch.ones_like(IDS), PLACES, 7)[0]
        theirs, bare = read(IDS).logits, causal.module(IDS).logits
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert (theirs - bare).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids == causal.tokenizer("abc").input_ids
    assert all(torch.equal(t, before[n]) for n, t in causal.module.state_dict().items())
    read.get_input_embeddings().weight.data.zero_()
    assert not read.get_output_embeddings().weight.any(), "input and output weights are no longer tied"


def test_our_own_loader_takes_the_export(causal: Resident, tmp_path: Path, written: Mapping[str, SiloData]) -> None:
    """As the base of the next experiment."""
    method = Full(lr=1e-3, local_steps=2, batch_size=2)
    tensors = trained(causal, written["zoo"], method)
    method.export(causal, tensors, tmp_path)
    found = load(Base(str(tmp_path), "float32"))
    weights = dict(found.module.named_parameters())
    assert all(torch.equal(t, weights[n]) for n, t in tensors.items())


def test_an_encoders_export(bert: Resident, tmp_path: Path, rated: Mapping[str, SiloData]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModel

    method = Full(lr=1e-2, local_steps=6, batch_size=2)
    tensors = trained(bert, rated["zoo"], method)
    method.export(bert, tensors, tmp_path)
    scores = Adapted(method, tensors, 2).open({"base": bert}).scores([Row("The tea was cold.", "a")], ["a", "b"])
    ids, head = torch.tensor([bert.tokenizer("The tea was cold.").input_ids]), load_file(tmp_path / "head.safetensors")
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state.mean(1)
    assert torch.allclose(scores, (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1), atol=1e-4)
    assert (scores[0, 0] - scores[0, 1]).abs() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_bf16_base_has_fp32_master_weights(
    architecture: str, written: Mapping[str, SiloData], tmp_path: Path
) -> None:
    """Changes too small for bf16 are not lost between steps; what is computed with is bf16."""
    from transformers import AutoModelForCausalLM

    base = tiny("bfloat16", architecture)
    method = Full(lr=1e-5, local_steps=4, batch_size=2)
    tensors = trained(base, written["zoo"], method)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    changed = {n: t - p.float() for (n, p), t in zip(base.module.named_parameters(), tensors.values(), strict=True)}
    assert any((d != 0).any() and torch.equal(tensors[n].bfloat16().float(), tensors[n] - d) for n, d in changed.items())
    method.export(base, tensors, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = dict(read.named_parameters())
    assert all(torch.equal(t, weights[n]) for n, t in tensors.items()), "in fp32, though the base is bf16"


def test_weights_of_one_silo_at_a_time(
    llama: Resident, written: Mapping[str, SiloData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cohort is asked for. The widest pass is told by the silos that training is really given."""
    passes: list[int] = []
    real = training.train

    def counted(*given: Any, **more: Any) -> training.Outcome:
        passes.append(len(given[3]))
        return real(*given, **more)

    monkeypatch.setattr(training, "train", counted)
    data = {f"{n}{i}": rows for i in range(2) for n, rows in written.items()}
    for method, expected in ((Full(local_steps=1, batch_size=2), [1] * 6), (Lora(local_steps=1, batch_size=2), [6])):
        passes.clear()
        engine = InProcess(data, {"base": llama}, cohort=8)
        method.round(method.begin(engine.reach(0)), engine.reach(1))
        assert passes == expected
