"""Pictures: every form a cell may have, what is no picture, and the pixels that a base looks at."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pillow

from fedtailor.data import Data, Loaded, load
from fedtailor.demo import fashion_mnist
from fedtailor.errors import UserError
from fedtailor.images import Image, Look, look_of, pixels, read

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4)
RGB = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
PLAIN, COLOURED = Look(4, 4, 1), Look(4, 4, 3)


def png(values: Any) -> bytes:
    out = io.BytesIO()
    pillow.fromarray(values).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize(
    "cell",
    [GREY.tolist(), GREY[..., None].tolist(), GREY.flatten().tolist(), GREY.tobytes(), str(GREY.tolist()), GREY],
    ids=["nested", "with channels", "flat", "bytes", "JSON", "array"],
)
def test_numbers(cell: Any) -> None:
    found = read(cell, Path())
    assert found == Image(GREY.tobytes(), (4, 4, 1))
    assert pixels(found, PLAIN).tolist() == [GREY.tolist()]
    assert pixels(found, COLOURED).tolist() == [GREY.tolist()] * 3


@pytest.mark.parametrize("cell", [RGB.tolist(), RGB.flatten().tolist(), RGB.tobytes()], ids=["nested", "flat", "bytes"])
def test_numbers_in_colour(cell: Any) -> None:
    found = read(cell, Path())
    assert pixels(found, COLOURED).tolist() == RGB.transpose(2, 0, 1).tolist()
    assert pixels(found, PLAIN).tolist() == [np.asarray(pillow.fromarray(RGB).convert("L")).tolist()]


def test_files(tmp_path: Path) -> None:
    data = png(RGB)
    (tmp_path / "a.png").write_bytes(data)
    for cell in ("a.png", str(tmp_path / "a.png"), data, {"bytes": data, "path": None}, {"bytes": None, "path": "a.png"}):
        found = read(cell, tmp_path)
        assert found == Image(data)
        assert pixels(found, COLOURED).tolist() == RGB.transpose(2, 0, 1).tolist()


def test_equal_pictures_are_equal_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(RGB))
    one, other = read("a.png", tmp_path), read("b.png", tmp_path)
    assert one.sha256() == other.sha256()
    assert one.sha256() != read(png(RGB[::-1]), tmp_path).sha256()
    assert Image(bytes(16), (4, 4, 1)).sha256() != Image(bytes(16), (2, 8, 1)).sha256()


def test_another_size_is_resized_as_vit_does() -> None:
    wanted = pillow.fromarray(RGB).resize((6, 5), resample=2)
    assert pixels(read(RGB.tolist(), Path()), Look(5, 6, 3)).tolist() == np.asarray(wanted).transpose(2, 0, 1).tolist()
    assert pixels(read(GREY.tolist(), Path()), Look(5, 6, 1)).shape == (1, 5, 6)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ([1, 2], r"list of shape \(2,\) is no picture; write height x width"),
        ([[1, 2], [3]], "lists of unequal length"),
        ([[1, 2], [3, 256]], "whole, 0 to 255"),
        ([[1, 2], [3, -1]], "whole, 0 to 255"),
        ([[0.5, 2], [3, 1]], "whole, 0 to 255"),
        ([["a", "b"]], "whole, 0 to 255"),
        ([], "is no picture"),
        (3, r"int of shape \(\) is no picture"),
        (b"ab", "2 bytes that are no image file"),
        (b"\x89PNG and then no more", "21 bytes that are no image file"),
        ("no.png", "no image file '.*no.png'"),
        ("[1, 2", "Expecting ',' delimiter"),
        ("", "no image file"),
    ],
)
def test_no_pictures(cell: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        read(cell, tmp_path)


def test_the_look_is_the_processors_own() -> None:
    from transformers import ViTConfig, ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 5, "width": 6}, image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 3.0])
    look = look_of(ViTConfig(image_size=28), processor)
    assert (look.height, look.width, look.channels) == (5, 6, 3)
    assert (look.mean, look.std, look.scale) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), pytest.approx(1 / 255))
    values = pixels(Image(RGB.tobytes(), (4, 4, 3)), look).float() * look.scale
    mine = (values - torch.tensor(look.mean)[:, None, None]) / torch.tensor(look.std)[:, None, None]
    theirs = processor(images=RGB, input_data_format="channels_last", return_tensors="pt").pixel_values[0]
    assert torch.allclose(mine, theirs, atol=1e-6)
    off = ViTImageProcessor(size={"height": 5, "width": 6}, do_normalize=False, do_rescale=False)
    assert (look_of(ViTConfig(), off).mean, look_of(ViTConfig(), off).scale) == ((0.0,), 1.0)


def test_a_look_without_a_processor_is_the_configs() -> None:
    from transformers import BertConfig, ViTConfig

    assert look_of(ViTConfig(image_size=28, num_channels=1)) == Look(28, 28, 1)
    with pytest.raises(ValueError, match="no image_size"):
        look_of(BertConfig())
    assert Look(28, 28, 1).sha256() != Look(28, 28, 3).sha256()


def told(folder: Path, cells: list[Any], **more: Any) -> Loaded:
    lines = [json.dumps({"who": "ab"[i % 2], "kind": "xy"[i // 2 % 2], "picture": cell}) for i, cell in enumerate(cells)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    settings = {"image": "picture", "label": "kind", "silo_column": "who", "val_fraction": 0, "test_fraction": 0, **more}
    return load(Data(str(folder / "rows.jsonl"), **settings), {}, 0)


def test_rows_with_pictures(tmp_path: Path) -> None:
    """Files lie beside the table; a row's split and id come from what is in the picture."""
    (tmp_path / "a.png").write_bytes(png(RGB))
    loaded = told(tmp_path, ["a.png", GREY.tolist(), GREY.tolist(), "a.png"])
    (first, third), (second, fourth) = (loaded.silos[name].train for name in "ab")
    assert (first.prompt, first.answer, first.image, first.words()) == ("", "x", Image(png(RGB)), 0)
    assert second.image == third.image == Image(GREY.tobytes(), (4, 4, 1))
    assert len({row.id for row in (first, second, third, fourth)}) == 4  # two pictures under two labels each
    assert told(tmp_path, ["a.png", GREY.tolist(), GREY.tolist(), "a.png"]).sha256 == loaded.sha256
    assert told(tmp_path, ["a.png", GREY.tolist(), GREY.tolist(), GREY.tolist()]).sha256 != loaded.sha256
    many = [[[i, j], [i, j]] for i in range(40) for j in (0, 0, 1, 1)]
    split = told(tmp_path, many, test_fraction=0.3)
    sides = [{row.image for silo in split.silos.values() for row in getattr(silo, part)} for part in ("train", "test")]
    assert not sides[0] & sides[1]
    assert all(len(side) > 10 for side in sides)


def test_what_is_wrong_with_a_row_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: column 'picture': list of shape \(2,\) is no picture"):
        told(tmp_path, [GREY.tolist(), [1, 2], GREY.tolist()])
    with pytest.raises(UserError, match=r"\[data\] image: rows\.jsonl has no column 'pictur'; did you mean 'picture'\?"):
        told(tmp_path, [GREY.tolist()], image="pictur")
    for more in ({"template": "{kind}"}, {"label": "", "answer": "kind"}):
        with pytest.raises(ValueError, match="image goes with label, and without template"):
            told(tmp_path, [GREY.tolist()], **more)


def test_a_set_of_bytes_is_read_as_it_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the demo set of clothes has them."""
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    rows = [{"id": str(i), "split": "train", "label": "xy"[i % 2], "image": bytes([i] * 784)} for i in range(4)]
    monkeypatch.setattr(fashion_mnist, "build", lambda: rows)
    data = Data("fashion_mnist", image="image", label="label", partition="iid", silos=2, val_fraction=0, test_fraction=0)
    found = [row.image for silo in load(data, {}, 0).silos.values() for row in silo.train]
    assert {image.shape for image in found if image} == {(28, 28, 1)}
    assert sorted(image.data[0] for image in found if image) == [0, 1, 2, 3]


def test_a_folder_of_datasets_with_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    pictures = [{"bytes": png(RGB + i), "path": None} for i in range(4)]
    datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 0, 1]}, features).save_to_disk(str(tmp_path / "set"))
    data = Data(
        str(tmp_path / "set"), image="picture", label="kind", partition="iid", silos=2, val_fraction=0, test_fraction=0
    )
    found = [row for silo in load(data, {}, 0).silos.values() for row in silo.train]
    assert {row.image.data for row in found if row.image} == {p["bytes"] for p in pictures}
    assert {row.answer for row in found} == {"x", "y"}
