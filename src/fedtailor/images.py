"""Pictures: from a cell of a table to a row's `Image`, and from that to the pixels that a vision base looks at."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.errors import UserError

FILES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")  # how image files begin
SHAPES = "height x width x (1 or 3) numbers of 0 to 255, nested or in one row of a square's"


@dataclass(frozen=True)
class Image:
    """One picture, hashable and small: a compressed file stays one until it is looked at."""

    data: bytes  # an image file's, or the numbers themselves, row by row, channels last
    shape: tuple[int, int, int] | None = None  # height, width, channels; None: `data` is a file's

    def sha256(self) -> str:
        return hashlib.sha256(repr(self.shape).encode() + self.data).hexdigest()

    def __str__(self) -> str:
        return "[image]" if self.shape is None else f"[image of {self.shape[0]} x {self.shape[1]}]"


@dataclass(frozen=True)
class Look:
    """What a vision base looks at: pictures of one size, their numbers scaled, shifted by `mean` and divided by `std`."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...] = (0.5,)  # per channel, or one for all
    std: tuple[float, ...] = (0.5,)
    scale: float = 1 / 255
    processor: Any = None  # the base's own, of transformers: it resizes and crops; None: resized here, to the same size

    def sha256(self) -> str:
        own = None if self.processor is None else self.processor.to_dict()
        told = [self.height, self.width, self.channels, self.mean, self.std, self.scale, own]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def read(found: Any, folder: Path) -> Image:
    """The picture in a cell: the path of an image file (from `folder`), a file's bytes, raw grey or RGB bytes of a square,
    a list of numbers (in CSV as JSON text), or what `datasets` makes of an image ({bytes, path}). Raises ValueError."""
    if isinstance(found, Mapping) and {"bytes", "path"} >= set(found):
        found = found.get("bytes") or found.get("path") or ""
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = json.loads(found)
    if isinstance(found, str):
        path = folder / Path(found).expanduser()
        try:
            return _file(path.read_bytes())
        except OSError as error:
            raise ValueError(f"no image file {str(path)!r} ({error.strerror})") from None
    if isinstance(found, bytes):
        return _file(found) if found.startswith(FILES) or _square(len(found)) is None else Image(found, _square(len(found)))
    return _numbers(found)


def pixels(image: Image, look: Look) -> Tensor:
    """(channels, height, width) uint8, as the base's own processor cuts it, before it is scaled."""
    values = _channels(_decoded(image) if image.shape is None else _shaped(image), look.channels)
    if look.processor is not None:
        cut = look.processor(
            images=values, input_data_format="channels_last", do_rescale=False, do_normalize=False, return_tensors="pt"
        ).pixel_values[0]
        return cut.round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]
    if values.shape[:2] != (look.height, look.width):
        flat = values[..., 0] if look.channels == 1 else values
        small = _pillow().fromarray(flat).resize((look.width, look.height), resample=2)  # bilinear, as ViT's processor
        values = np.asarray(small).reshape(look.height, look.width, look.channels)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def look_of(config: Any, processor: Any = None) -> Look:
    """By the base's own processor where it brings one, else by its config. Raises ValueError where neither says a size."""
    channels = int(getattr(config, "num_channels", 3))
    if processor is None:
        size = getattr(config, "image_size", None)
        if size is None:
            raise ValueError("its config has no image_size, and it has no preprocessor_config.json")
        height, width = (size, size) if isinstance(size, int) else size
        return Look(int(height), int(width), channels)
    blank = Image(bytes(64 * 64), (64, 64, 1))
    _, height, width = pixels(blank, Look(0, 0, channels, processor=processor)).shape
    plain = not getattr(processor, "do_normalize", True)
    mean, std = (0.0, 1.0) if plain else (processor.image_mean, processor.image_std)
    scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
    return Look(height, width, channels, _tuple(mean), _tuple(std), scale, processor)


def _tuple(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values) if isinstance(values, list | tuple) else (float(values),)


def _square(count: int) -> tuple[int, int, int] | None:
    """The shape of that many numbers in one row: a grey square, or an RGB one."""
    for channels in (1, 3):
        side = math.isqrt(count // channels)
        if count and side * side * channels == count:
            return side, side, channels
    return None


def _numbers(found: Any) -> Image:
    try:
        values = np.asarray(found)
    except ValueError:
        raise ValueError(f"lists of unequal length; write {SHAPES}") from None
    if values.ndim == 1 and (shape := _square(len(values))) is not None:
        values = values.reshape(shape)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size:
        raise ValueError(f"{type(found).__name__} of shape {values.shape} is no picture; write {SHAPES}, or a file's path")
    if values.dtype.kind not in "iuf" or values.min() < 0 or values.max() > 255 or (values % 1).any():
        raise ValueError(f"a picture's numbers must be whole, 0 to 255; write {SHAPES}")
    height, width, channels = map(int, values.shape)
    return Image(values.astype(np.uint8).tobytes(), (height, width, channels))


def _file(data: bytes) -> Image:
    pillow = _pillow()
    try:
        pillow.open(io.BytesIO(data)).verify()
    except Exception as error:  # Pillow raises a dozen kinds, SyntaxError among them
        raise ValueError(f"{len(data)} bytes that are no image file Pillow knows, and no square of numbers") from error
    return Image(data)


def _shaped(image: Image) -> Any:
    return np.frombuffer(image.data, np.uint8).reshape(image.shape or ())


def _decoded(image: Image) -> Any:
    """(height, width, 3) uint8."""
    from PIL import ImageOps

    return np.asarray(ImageOps.exif_transpose(_pillow().open(io.BytesIO(image.data))).convert("RGB"))


def _channels(values: Any, count: int) -> Any:
    if values.shape[2] == count:
        return values
    if count == 1:  # ITU-R 601-2, as Pillow's own "L"
        return (values @ np.array([299, 587, 114]) / 1000).round().astype(np.uint8)[..., None]
    return np.repeat(values, count, axis=2)


def _pillow() -> Any:
    try:
        from PIL import Image as pillow
    except ImportError:
        what = "image files, and pictures of another size than the base's,"
        raise UserError(f"[data] image: {what} need Pillow: pip install pillow") from None
    return pillow
