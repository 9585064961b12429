"""A finished run as a folder for others: plain transformers gives what the run serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from fedtailor import models, whole, wire
from fedtailor.errors import UserError
from tiny_runs import FEDERATED, conduct

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [1, 2, 3, 4, 5, 6, 7]])
QUICK = (FEDERATED, "rounds=1", "model.dtype=float32", "method.lr=0.05")


def served(run: Path) -> torch.Tensor:
    model = wire.read_file(run / "adapter" / "served.safetensors").open({"base": models.load(models.Base("tiny", "float32"))})
    with torch.no_grad():
        places = torch.arange(IDS.shape[1]).expand_as(IDS)
        found: torch.Tensor = model.tuned.using(model.tensors, IDS, torch.ones_like(IDS), places, IDS.shape[1])[0]
    return found


METHODS: dict[str, tuple[str, ...]] = {
    "lora": (), "lora exact": ("method.combine=exact",), "lora dora": ("method.dora=true",), "ia3": (), "vera": (),
    "layernorm": (), "bitfit": (), "full": (),
}  # fmt: skip


@pytest.mark.parametrize("what", METHODS)
def test_merged_it_is_a_plain_model(tmp_path: Path, what: str) -> None:
    from transformers import AutoModelForCausalLM

    run, out = tmp_path / "run", tmp_path / "model"
    conduct(run, *QUICK, f"method.name={what.split()[0]}", *METHODS[what])
    whole.export(run, out, merge=True)
    module: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    assert module.dtype == torch.float32
    with torch.no_grad():
        theirs = module(IDS).logits
        bare = models.load(models.Base("tiny", "float32")).tuned()
        base = bare(IDS, torch.ones_like(IDS), torch.arange(7).expand_as(IDS), 7)[0]
    assert torch.allclose(theirs, served(run), atol=1e-4)
    assert (theirs - base).abs().max() > 1e-3
    assert not (out / "served.safetensors").exists()


@pytest.mark.parametrize(("method", "why"), [("prefix", "virtual tokens are no change"), ("adapter", "layers of their own")])
def test_what_is_no_change_of_weights_is_not_merged(tmp_path: Path, method: str, why: str, fedtailor: Command) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    conduct(run, *QUICK, f"method.name={method}")
    with pytest.raises(UserError, match=why):
        whole.export(run, out, merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left half"
    ended = fedtailor("export", run, out)
    assert ended.code == 0
    assert {path.name for path in out.iterdir()} >= {"adapter": {"load.py"}, "prefix": {"adapter_config.json"}}[method]
    assert fedtailor("export", run, out).err == [f"fedtailor: {out}: taken; choose a new folder"]


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run there"):
        whole.export(tmp_path, tmp_path / "out", merge=False)
