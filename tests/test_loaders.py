"""An exported classifier by its own load.py alone: the label words, and the scores that are served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pillow

from fedtailor import loaders
from fedtailor.data import Row
from fedtailor.find import method as named
from fedtailor.images import Image, read
from fedtailor.methods.averaging import Adapted
from fedtailor.models import Base, Resident, load
from test_added import begun, loaded, moved

LABELS = ("bad", "good")
TEXTS = ("The tea was cold.", "x", "A parcel, and a long one, came late " * 20)
ALL = ("head", "lora", "bitfit", "adapter", "prefix", "soft_prompt", "full")


def exported(base: Resident, name: str, folder: Path) -> Adapted:
    method = named(name)()
    begins = begun(base, method, 2)
    tensors = {n: t + 0.02 * torch.randn_like(t) for n, t in begins.items()} if name == "full" else moved(begins)
    method.export(base, tensors, folder)
    loaders.classifier(base, LABELS, folder)
    return Adapted(method, tensors, 2)


@pytest.mark.parametrize("name", [*ALL, "p_tuning"])
def test_texts(bert: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """In one padded batch; the longest is cut where the served model cuts it."""
    base, folder = tmp_path / "base", tmp_path / "out"
    plain("bert").save_pretrained(base)
    bert.tokenizer.save_pretrained(base)
    folder.mkdir()
    served = exported(bert, name, folder)
    scores = loaded(folder).classifier(folder, None if name == "full" else base)
    assert scores.labels == json.loads((folder / "labels.json").read_text()) == list(LABELS)
    ours = served.open({"base": bert}).scores([Row(text, "bad") for text in TEXTS], LABELS)
    assert torch.allclose(scores(TEXTS), ours, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_pictures(vit: Resident, plain: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """Of another size than the base's, grey and in colour."""
    base, folder = tmp_path / "base", tmp_path / "out"
    plain("vit").save_pretrained(base)
    folder.mkdir()
    served = exported(vit, name, folder)
    files = []
    for i, shape in enumerate(((40, 31), (28, 28, 3))):
        files.append(f"{tmp_path}/{i}.png")
        pillow.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)).save(files[-1])
    rows = [Row("", "bad", image=read(file, Path())) for file in files]
    ours = served.open({"base": vit}).scores(rows, LABELS)
    found = loaded(folder).classifier(folder, None if name == "full" else base)(files)
    assert torch.allclose(found[0], ours[0], atol=1e-4)
    assert torch.allclose(found[1], ours[1], atol=1e-2)  # colours made grey: rounded otherwise by one in 255 at most


def test_pictures_by_the_bases_own_processor(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    module: Any = ViTModel(ViTConfig(**sizes, image_size=14, patch_size=7)).eval()
    module.save_pretrained(tmp_path / "base")
    processor: Any = ViTImageProcessor(size={"height": 14, "width": 14}, image_mean=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path / "base")
    base = load(Base(str(tmp_path / "base"), "float32"))
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    (tmp_path / "out").mkdir()
    served = exported(base, "head", tmp_path / "out")
    ours = served.open({"base": base}).scores([Row("", "bad", image=Image(picture.tobytes(), (30, 20, 3)))], LABELS)
    found = loaded(tmp_path / "out").classifier(tmp_path / "out", tmp_path / "base")([pillow.fromarray(picture)])
    assert torch.allclose(found, ours, atol=1e-4)


def test_without_words_nothing_is_written(bert: Resident, tmp_path: Path) -> None:
    named("head")().export(bert, begun(bert, named("head")(), 2), tmp_path)
    loaders.classifier(bert, (), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
