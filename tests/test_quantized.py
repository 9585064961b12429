"""Bases of 4- or 8-bit weights (bitsandbytes): used as they are, trained beside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import find, models, whole, wire
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import UserError
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.lora import Lora
from fedtailor.models import Base, Resident
from fedtailor.tiny import byte_tokenizer
from tiny_runs import conduct

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])
TRAINING = {n: kind for n, kind in find.methods().items() if issubclass(kind, Averaging)}
METHODS = [n for n, kind in TRAINING.items() if "causal" in kind.FOR and n not in ("full", "peft")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of the same small Llama, as it was made ("fp32") or quantized ("nf4", "int8")."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = LlamaForCausalLM(LlamaConfig(vocab_size=260, pad_token_id=256, bos_token_id=257, eos_token_id=257, **sizes))
    made.save_pretrained(folder / "fp32")
    hows: dict[str, Any] = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
    for name, how in hows.items():
        config = BitsAndBytesConfig(**how)
        AutoModelForCausalLM.from_pretrained(
            folder / "fp32", quantization_config=config, dtype=torch.float32
        ).save_pretrained(folder / name)
    for name in ("fp32", *hows):
        byte_tokenizer().save_pretrained(folder / name)
    return lambda name: folder / name


@pytest.fixture(params=["nf4", "int8"])
def small(request: pytest.FixtureRequest, saved: Callable[[str], Path]) -> Resident:
    return models.load(Base(str(saved(request.param)), "float32"))


def rounds(resident: Resident, data: Mapping[str, SiloData], method: Any, number: int = 2, cohort: int = 1) -> Any:
    engine = InProcess(data, {"base": resident}, rounds=number, cohort=cohort)
    state = method.begin(engine.reach(0))
    for at in range(1, number + 1):
        state = method.round(state, engine.reach(at))
        engine.commit()
    return state


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_beside_it(small: Resident, rated: dict[str, SiloData], name: str) -> None:
    """And one after the other (methods are put on and taken off), and a cohort gives the same, silo by silo."""
    method = find.method(name)(local_steps=2, batch_size=2)
    before = {n: t.clone() for n, t in small.module.state_dict().items() if "." in n and "lora" not in n}
    state = rounds(small, rated, method)
    engine = InProcess(rated, {"base": small}, rounds=2)
    first = method.begin(engine.reach(0))
    assert any(not torch.equal(t, first.tensors[n]) for n, t in state.tensors.items())
    assert wire.pack(rounds(small, rated, method, cohort=3)) == wire.pack(state)
    small.tuned()
    after = small.module.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items() if n in after)


def test_it_is_the_base_that_was_quantized(saved: Callable[[str], Path], small: Resident) -> None:
    whole_one = models.load(Base(str(saved("fp32")), "float32"))
    with torch.no_grad():
        exact, found = whole_one.module(IDS).logits, small.module(IDS).logits
    assert (exact - found).abs().max() < 0.2 * exact.abs().max()
    assert not whole_one.quantized
    assert small.quantized


def test_gradients_come_through_after_scoring(small: Resident, rated: dict[str, SiloData]) -> None:
    """bitsandbytes packs 4-bit weights at the first scoring on some CPUs, for use alone."""
    method = Lora(local_steps=1, batch_size=2, rank=2)
    unscored = rounds(small, rated, method, 1)
    with torch.no_grad():
        small.module(IDS)
    assert wire.pack(rounds(small, rated, method, 1)) == wire.pack(unscored)


def test_exact_aggregation_leaves_it_untouched(small: Resident, rated: dict[str, SiloData], tmp_path: Path) -> None:
    """The gap is rounding; plain PEFT loads the export on the quantized base, with the served model's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    gaps = {}
    for combine in ("exact", "mean"):
        method = Lora(combine=combine, local_steps=3, batch_size=2, rank=2, lr=0.02)  # type: ignore[arg-type]
        state = rounds(small, rated, method)
        gaps[combine] = state.notes["gap"]
        if combine == "exact":
            served = method.serve(state)
            method.export(small, served.tensors, tmp_path / "adapter")
            tuned = served.method.put_on(small, 0)
            with torch.no_grad():
                expected = tuned.using(served.tensors, IDS, torch.ones_like(IDS), torch.arange(7).expand(2, 7), 7)[0]
    assert gaps["exact"] < 1e-5 < 1e-2 < gaps["mean"]
    again = AutoModelForCausalLM.from_pretrained(small.source, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    for layer in loaded.modules():  # the other side's own use of packed weights is another rounding
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(IDS).logits, expected, atol=1e-4)


def test_what_cannot_be_is_said(small: Resident, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"those of a quantized base cannot be; choose lora"):
        find.method("full")().put_on(small, 0)
    run = tmp_path / "run"
    conduct(run, f"model.name={small.source}", "method.name=lora", "rounds=1")
    with pytest.raises(UserError, match=r"the base is quantized: merging would round what was learnt; export without --merge"):
        whole.export(run, tmp_path / "merged", merge=True)
    note = json.loads((run / "result.json").read_text())["environment"]["cohort_note"]
    assert note == "silos trained one by one: torch.func.vmap has no rule for quantized weights"


def test_without_bitsandbytes_the_extra_is_named(saved: Callable[[str], Path]) -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"  # as where it is not installed
        "from fedtailor import models; from fedtailor.errors import UserError\n"
        f"try: models.load(models.Base({str(saved('nf4'))!r}))\n"
        "except UserError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "it needs a package that is not here" in told
    assert "pip install 'fedtailor[quantized]'" in told
