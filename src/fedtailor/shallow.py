"""A base with some of its layers: a smaller model that answers at once, for silos that cannot hold the whole one."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fedtailor import fetch, progress
from fedtailor.errors import UserError


def folder(source: str, revision: str | None, layers: int) -> Path:
    """A cached folder that `from_pretrained` loads: `layers` of the model's own, evenly spaced, first and last among them
    (DistilBERT starts from every second, Sanh et al. 2019). Raises UserError where the model has fewer."""
    here = Path(source)
    files = sorted(here.iterdir()) if here.is_dir() else []
    told = [source, revision, layers, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    key = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    target = fetch.cache_dir() / "models" / f"{here.name}-{layers}-layers-{key}"
    if not target.exists():
        progress.line(f"cutting {here.name} to {layers} layers, once ...")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            _cut(source, revision, layers, made)
            if target.exists():  # another process was faster
                shutil.rmtree(made)
            else:
                made.rename(target)
    return target


def _cut(source: str, revision: str | None, layers: int, made: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source, revision=revision)
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    if config.is_encoder_decoder or hasattr(config, "num_channels"):
        raise UserError(f"[model] layers: {source} is no causal model and no encoder; only those can be cut")
    if not 0 < layers <= count:
        raise UserError(f"[model] layers = {layers}: {source} has {count}; choose 1 to {count}")
    causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or [])
    auto: Any = AutoModelForCausalLM if causal else AutoModel
    model = auto.from_pretrained(source, revision=revision, dtype="auto")
    kept = [round(i * (count - 1) / max(layers - 1, 1)) for i in range(layers)]
    name, stack = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList(stack[i] for i in kept))
    if types := getattr(model.config, "layer_types", None):  # of sliding and full attention, one a layer
        model.config.layer_types = [types[i] for i in kept]
    model.config.num_hidden_layers = layers
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(made)
