"""Bodies in files: whole or not at all, large ones read as they are used, and a full disk told as such."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from disks import no_file_above
from fedtailor import packed, wire
from fedtailor.packed import Spooled, digest
from fedtailor.wire import WireError

wire.allow(__name__)


@dataclass(frozen=True)
class Body:
    value: Any


def test_a_spooled_body_is_the_packed_one_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body({"a": torch.arange(3000.0), "b": (torch.ones(7, dtype=torch.bfloat16), "text", 2)})
    monkeypatch.setattr(wire, "LARGE", 12_000)
    spooled = wire.spooled(body, tmp_path / "spool")
    assert isinstance(spooled, Spooled)
    assert list((tmp_path / "spool").iterdir()) == []
    assert digest(spooled) == digest(wire.pack(body))
    came = wire.unpack(spooled)
    assert wire.pack(came) == wire.pack(body)
    came.value["a"].add_(1)  # what was read is its reader's own: the file stays as it is
    assert wire.pack(wire.unpack(spooled)) == wire.pack(body)


def test_a_small_body_or_one_without_a_folder_stays_in_memory(tmp_path: Path) -> None:
    small, big = Body(torch.ones(3)), Body(torch.zeros(packed.LARGE // 4))
    assert wire.spooled(small, tmp_path) == wire.pack(small)
    assert wire.spooled(big, None) == wire.pack(big)


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 64, wire.pack(Body(torch.ones(9)))[:-1]])
def test_a_spooled_body_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    file = packed.nameless(tmp_path)
    file.write(data)
    with pytest.raises(WireError, match=f"{len(data)} bytes that are no body of ours"):
        wire.unpack(Spooled(file))


def test_a_full_disk_is_told_in_the_systems_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGE", 0)
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        wire.spooled(Body(torch.zeros(1000)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_outlives_its_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGE", 0)
    wire.write_file(tmp_path / "state", Body(torch.arange(100.0)))
    old = wire.read_file(tmp_path / "state")
    wire.write_file(tmp_path / "state", Body(torch.zeros(100)))
    assert torch.equal(old.value, torch.arange(100.0))
    assert torch.equal(wire.read_file(tmp_path / "state").value, torch.zeros(100))


def test_a_file_holds_what_was_packed(tmp_path: Path) -> None:
    file = tmp_path / "body.safetensors"
    count = wire.write_file(file, Body({"w": torch.arange(4.0)}))
    assert file.stat().st_size == count == len(wire.pack(Body({"w": torch.arange(4.0)})))
    assert torch.equal(wire.read_file(file).value["w"], torch.arange(4.0))
    assert [found.name for found in tmp_path.iterdir()] == ["body.safetensors"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "body.safetensors"
    wire.write_file(file, Body(1))
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        wire.write_file(file, Body(torch.zeros(1000)))
    assert wire.read_file(file) == Body(1)
    assert [found.name for found in tmp_path.iterdir()] == ["body.safetensors"]


def test_a_body_that_cannot_cross_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "body.safetensors"
    wire.write_file(file, Body(1))
    with pytest.raises(WireError):
        wire.write_file(file, Body(object()))
    assert wire.read_file(file) == Body(1)


def test_a_name_that_cannot_be_replaced_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        wire.write_bytes(tmp_path / "taken", b"data")
    assert [found.name for found in tmp_path.iterdir()] == ["taken"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "body.safetensors"
    file.write_bytes(wire.pack(Body(torch.ones(3)))[:-1])
    with pytest.raises(WireError) as damaged:
        wire.read_file(file)
    assert str(damaged.value).startswith(f"{file}: ")
