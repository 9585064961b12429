"""Vision bases: pictures in, the mean over the places that they are cut into, and an encoder's head on that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedtailor import images
from fedtailor.added import Added
from fedtailor.errors import SiloError
from fedtailor.rows import Row
from fedtailor.tuned import NONE, Batch, Tensors, Tuned

if TYPE_CHECKING:
    from fedtailor.models import Resident


class Looking(Tuned):
    """A base that is called with `pixel_values`."""

    def __init__(self, inner: nn.Module, *, head: nn.Linear | None, added: Added | None, look: images.Look) -> None:
        super().__init__(inner, head=head, added=added)
        self.look = look

    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        """(B, channels, height, width) uint8 -> (B, classes)."""
        assert self.head is not None
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.look.mean, self.look.std))
        values = (pixels.float() * self.look.scale - mean) / std
        hidden = self.base(pixel_values=values.to(self.base.dtype)).last_hidden_state
        if hidden.dim() == 4:  # (B, D, H, W) of a convolutional base
            hidden = hidden.flatten(2).transpose(1, 2)
        extra = 0 if self.added is None else self.added.places
        if extra:  # trained places stand after the first, which is the base's class token; they are not the picture's
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + extra :]], dim=1)
        return self.head(hidden.mean(1).to(self.head.weight.dtype))  # type: ignore[no-any-return]

    def logits(self, tensors: Tensors | None, batch: Batch) -> Tensor:  # type: ignore[override]
        return self.using(tensors, batch.pixels)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Seen:
    """One row: its picture, cut to size as a batch is made of it, and the number of its label."""

    image: images.Image
    look: images.Look
    label: int
    places: int  # that the base cuts it into, about

    def __len__(self) -> int:
        return self.places


def encode(resident: Resident, rows: Sequence[Row], labels: Sequence[str]) -> list[Seen]:
    assert resident.look is not None
    patch = getattr(resident.module.config, "patch_size", 16)
    side = patch if isinstance(patch, int) else patch[0]
    places = max(1, resident.look.height // side) * max(1, resident.look.width // side)
    seen = []
    for row in rows:
        if row.image is None:
            raise SiloError("a row has no picture, and the base is a vision model; set data.image")
        seen.append(Seen(row.image, resident.look, labels.index(row.answer), places))
    return seen


def batch(items: Sequence[Seen]) -> Batch:
    classes = torch.tensor([item.label for item in items])
    return Batch(NONE, NONE, NONE, classes, torch.stack([images.pixels(i.image, i.look) for i in items]))
