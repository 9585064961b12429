"""The example that starts a whole federation on this machine, and what docs/federation.md promises of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_runs import conduct

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

ROOT = Path(__file__).resolve().parents[1]
LABELS = 'data.labels=["bad", "good"]'


def test_a_whole_federation_ends_in_the_same_adapter_and_leaves_no_process(tmp_path: Path) -> None:
    silos = [f"--silo={name}" for name in ("cafe", "clinic", "shop")]
    command = [sys.executable, ROOT / "examples" / "federation.py", ROOT / "experiments" / "tiny.toml", *silos]
    done = subprocess.run(
        [*command, "--set", LABELS, "--set", "engine.cohort=1", "--out", tmp_path / "afar"],
        env={**os.environ, "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Federated customization (prefix) over 3 silos reaches accuracy" in done.stdout
    conduct(tmp_path / "here", 'rows=["federated"]', LABELS)
    adapters = [(tmp_path / place / "adapter" / "adapter_model.safetensors").read_bytes() for place in ("afar", "here")]
    assert adapters[0] == adapters[1]
    kits = next(line.split(": ")[1].split("  ")[0] for line in done.stdout.splitlines() if line.startswith("server: "))
    assert not Path(kits).exists()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(Path(kits).parent) not in left
