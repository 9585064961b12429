"""A finished run as a folder for others: plain transformers gives what the run serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from fedtailor import models, whole, wire
from fedtailor.errors import RunError, UserError
from tiny_runs import FEDERATED, conduct

IDS = torch.tensor([[5, 60, 61, 80, 5, 99, 120], [64, 68, 72, 65, 77, 78, 83]])  # the second row: letters, which are trained on
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
    "lora tied": ('method.targets=["lm_head"]',),
    "peft tied": ('method.settings={r = 4, lora_alpha = 8, target_modules = ["embed_tokens"]}',),
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


def test_a_folder_that_says_something_else_is_not_kept(tmp_path: Path) -> None:
    """By an adapter changed behind the run's back."""
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    conduct(run, *QUICK, "method.name=lora")
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({n: 2 * t for n, t in load_file(file).items()}, file)
    with pytest.raises(RunError, match=r"it says other than what is served \(off by .* export without --merge"):
        whole.export(run, tmp_path / "model", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left half"


@pytest.mark.parametrize("settings", ['type="lora"', 'type="lily"'])
def test_what_peft_cannot_merge(tmp_path: Path, settings: str) -> None:
    more = 'method.settings={r=2, lora_bias=true, target_modules=["q_proj"]}' if "lora" in settings else "method.lr=0.01"
    conduct(tmp_path / "run", *QUICK, "method.name=peft", f"method.{settings}", more)
    with pytest.raises(UserError, match=r"^PEFT cannot merge this adapter \(.+\); export without --merge$"):
        whole.export(tmp_path / "run", tmp_path / "model", merge=True)


def test_one_seed_of_several(tmp_path: Path, fedtailor: Command) -> None:
    """The first in the run's own order, not the folders', which an alphabet would sort the other way."""
    run, out = tmp_path / "run", tmp_path / "first"
    conduct(run, *QUICK, "seeds=[9, 10]", "method.name=prefix")
    ended = fedtailor("export", run, out)
    assert (ended.code, ended.err) == (0, ["seed 9 of 9, 10: choose another with --seed"])
    whole.export(run, tmp_path / "other", merge=False, seed=10)
    for seed, folder in ((9, out), (10, tmp_path / "other")):
        file = "adapter_model.safetensors"
        assert (folder / file).read_bytes() == (run / f"seed-{seed}" / "adapter" / file).read_bytes()
    with pytest.raises(UserError, match=r"--seed 3: .* has none such \(choices: 9, 10\)"):
        whole.export(run, tmp_path / "third", merge=False, seed=3)
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"no finished run there \(no result.json\)"):
        whole.export(run, tmp_path / "third", merge=False)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run there"):
        whole.export(tmp_path, tmp_path / "out", merge=False)
