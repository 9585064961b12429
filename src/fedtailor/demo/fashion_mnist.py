"""Small pictures of clothes. H. Xiao, K. Rasul, R. Vollgraf (2017), arXiv 1708.07747."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

from fedtailor import fetch
from fedtailor.demo import split_of

DESCRIPTION = "70,000 grey pictures of 28 x 28, ten kinds of clothes; no natural silos, so deal them by label"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def build() -> list[dict[str, Any]]:
    with fetch.deb(["dataset-fashion-mnist"]) as found:
        return from_folder(found["dataset-fashion-mnist"] / "usr" / "share" / "datasets" / "fashion-mnist")


def from_folder(folder: Path) -> list[dict[str, Any]]:
    """Columns: id, split, label, image (784 bytes, row by row, 0 is background). The set's own test split; of its
    training pictures a ninth is for validation."""
    rows = []
    for part, split in (("train", ""), ("t10k", "test")):
        images = _idx(folder, f"{part}-images-idx3-ubyte")
        labels = _idx(folder, f"{part}-labels-idx1-ubyte")
        size = len(images) // len(labels)
        for number, label in enumerate(labels):
            id = f"{part}:{number}"
            own = split or ("valid" if split_of(id) == "valid" else "train")
            rows.append(
                {"id": id, "split": own, "label": LABELS[label], "image": images[number * size : (number + 1) * size]}
            )
    return rows


def _idx(folder: Path, name: str) -> bytes:
    """The values of an IDX file of unsigned bytes: two zeros, type 8, the number of dimensions, their sizes, data."""
    plain = folder / name
    raw = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    kind, dimensions = struct.unpack(">HBB", raw[:4])[1:]
    assert kind == 8, f"{name}: IDX type {kind}"
    return raw[4 + 4 * dimensions :]
