"""Packed bodies, as they cross: bytes in memory or, when large, in a file that goes with its last holder.

Nothing here knows what is inside (`wire` does), so that what only carries them starts without torch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

LARGE = 16 * 1024**2  # bytes from which on a body lies on disk, where there is a folder for it
PIECE = 1 << 20  # bytes read at once: the C library keeps back twice the largest piece that it was given back


class Spooled:
    """A packed body in an open file. It may have no name any more: then it is gone when nobody holds this."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self.size

    @property
    def path(self) -> str:
        """Where this process can open the file once more, named or not."""
        return f"/dev/fd/{self.file.fileno()}"

    @cached_property
    def digest(self) -> bytes:
        found = hashlib.sha256()
        for offset in range(0, self.size, PIECE):
            found.update(os.pread(self.file.fileno(), PIECE, offset))
        return found.digest()

    def copy(self, path: Path) -> None:
        with path.open("wb") as out:
            for offset in range(0, self.size, PIECE):
                out.write(os.pread(self.file.fileno(), PIECE, offset))


Packed = bytes | Spooled


def digest(body: Packed) -> bytes:
    """SHA-256."""
    return body.digest if isinstance(body, Spooled) else hashlib.sha256(body).digest()


def nameless(folder: Path) -> BinaryIO:
    """A new file in `folder`, made if need be, that only this process can open."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return tempfile.TemporaryFile(dir=folder, buffering=0)
