"""Bodies in memory and in files: the same bytes, the same digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedtailor.packed import LARGE, Spooled, digest, nameless


@pytest.mark.parametrize("size", [0, 1, LARGE, LARGE + 1])
def test_a_body_in_a_file_is_the_same_as_in_memory(tmp_path: Path, size: int) -> None:
    body = os.urandom(size)
    file = nameless(tmp_path / "spool")
    file.write(body)
    spooled = Spooled(file)
    assert len(spooled) == size
    assert digest(spooled) == digest(body) == hashlib.sha256(body).digest()
    assert Path(spooled.path).read_bytes() == body
    spooled.copy(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body


def test_nobody_else_finds_it(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    held = nameless(folder)
    held.write(b"private")
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o077 == 0
