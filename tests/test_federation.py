"""The example that starts a whole federation on this machine, and what docs/federation.md promises of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from background import left
from commands import LABELLED
from fedtailor import demo, experiment, packaged, runs
from tiny_runs import conduct

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

ROOT = Path(__file__).resolve().parents[1]


def federation(file: str, silos: Sequence[str], sets: Sequence[str], out: Path) -> str:
    """What the example printed; it must have ended well and left nothing behind."""
    command = [sys.executable, ROOT / "examples" / "federation.py", ROOT / "experiments" / file, "--out", out]
    words = [f"--silo={silo}" for silo in silos] + [f"--set={one}" for one in sets]
    environment = {**os.environ, "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    server = next(line.split(": ")[1].split("  ")[0] for line in done.stdout.splitlines() if line.startswith("server: "))
    folder = Path(server).parent.parent
    assert not folder.exists()
    assert left(folder) == []
    return done.stdout


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_whole_federation_ends_in_the_same_adapter_and_leaves_no_process(tmp_path: Path) -> None:
    said = federation("tiny.toml", ["cafe", "clinic", "shop"], [LABELLED, "engine.cohort=1"], tmp_path / "afar")
    assert "Federated customization (prefix) over 3 silos reaches accuracy" in said
    conduct(tmp_path / "here", 'rows=["federated"]', LABELLED)
    assert adapter(tmp_path / "afar") == adapter(tmp_path / "here")


SMALL = [
    "rounds=2", "data.max_train=12", "data.max_val=4", "data.max_test=6", "method.local_steps=2", "method.batch_size=2",
    'rows=["federated"]', "model.dtype=float32", "engine.threads=1", "engine.cohort=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs_data
def test_the_quickstart_over_a_federation_of_three_with_files_of_their_own(tmp_path: Path) -> None:
    """The real model in three workers; the result is that of one process, and plain PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) for line in demo.fetch("sentiment").read_text(encoding="utf-8").split("\n")[:-1]]
    names = ("news_editorials", "product_reviews", "tweets")
    files = {name: tmp_path / f"{name}.jsonl" for name in (*names, "all")}
    for name, file in files.items():
        mine = [row for row in rows if row["silo"] == name or (name == "all" and row["silo"] in names)]
        file.write_text("".join(json.dumps(row) + "\n" for row in mine), encoding="utf-8")
    federation("quickstart.toml", [f"{name}={files[name]}" for name in names], SMALL, tmp_path / "afar")

    asked = experiment.load(ROOT / "experiments" / "quickstart.toml", [*SMALL, f"data.source={files['all']}"])
    here = runs.begin(asked, tmp_path / "here", "a test").conduct()
    assert adapter(tmp_path / "afar") == adapter(tmp_path / "here")
    there = json.loads((tmp_path / "afar" / "result.json").read_text())
    for name in ("accuracy", "loss"):
        assert there["rows"]["federated"][name] == here["rows"]["federated"][name]
    base: Any = AutoModelForCausalLM.from_pretrained(packaged.folder("smollm2-135m"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "afar" / "adapter")
    assert loaded.active_peft_config.num_virtual_tokens == 15
