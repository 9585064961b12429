"""A step cut into pieces of like length is the same step: every row once, with its silo, and gradients that add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import pieces, training
from fedtailor.answering import Encoded, batch, class_batch
from fedtailor.data import SiloData
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.methods.soft_prompt import SoftPrompt
from fedtailor.models import Resident
from fedtailor.training import Local, draw
from fedtailor.tuned import IGNORED, Batch, Tensors, Tuned

CPU = torch.device("cpu")
METHODS = {"prefix": Prefix(virtual_tokens=4), "lora": Lora(rank=2), "soft_prompt": SoftPrompt(virtual_tokens=4), "full": Full()}


def rows_of(lengths: list[int], first: int) -> list[Encoded]:
    """Of each length one row, whose tokens are all the same number: `first`, `first` + 1, ..."""
    return [Encoded([first + i] * (n - 1), [first + i]) for i, n in enumerate(lengths)]


def test_a_batch_of_known_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    # sorted 2, 3, 9, 20; widths 8, 8, 16, 20 (no more than the widest row). Of 32 places a piece has 2 rows of 8 (16; a third
    # of 16 would make it 48), then one of 16 (two of 20 would be 40), then one of 20.
    monkeypatch.setattr(pieces, "room", lambda: 32)
    one = batch(rows_of([20, 3, 9, 2], 1), 0)
    assert pieces.worth([one], CPU)
    found = [piece for piece, _ in pieces.cut([one], 0)]
    assert [tuple(piece.input_ids.shape) for piece in found] == [(2, 8), (1, 16), (1, 20)]
    assert found[0].input_ids.tolist() == [[0, 0, 0, 0, 0, 0, 4, 4], [0, 0, 0, 0, 0, 2, 2, 2]]
    assert found[0].position_ids.tolist() == [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 2]]
    assert found[0].labels.tolist() == [[4], [2]]


def test_labels_that_no_row_of_a_piece_has_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "room", lambda: 16)
    one = batch([Encoded([1] * 8, [7] * 8), Encoded([2] * 5, [8]), Encoded([3] * 4, [9, 9])], 0)
    short, long = (piece for piece, _ in pieces.cut([one], 0))
    assert short.labels.tolist() == [[IGNORED, 8], [9, 9]]
    assert long.labels.tolist() == [[7] * 8]


def test_what_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    one = batch(rows_of([20, 3], 1), 0)
    assert not pieces.worth([one], CPU)  # 40 places are less than a piece has
    monkeypatch.setattr(pieces, "room", lambda: 32)
    assert pieces.worth([one], CPU)
    assert not pieces.worth([one], torch.device("meta"))
    pixels = Batch(torch.empty(0), torch.empty(0), torch.empty(0), torch.zeros(2), pixels=torch.zeros(2, 1, 8, 8))
    decoded = Batch(one.input_ids, one.attention_mask, one.position_ids, one.labels, decoder_ids=torch.zeros(2, 1))
    assert not pieces.worth([pixels], CPU)
    assert not pieces.worth([decoded], CPU)
    assert not pieces.worth([object()], CPU)  # type: ignore[list-item]


Lengths = st.lists(st.integers(1, 30), min_size=3, max_size=3)


@given(silos=st.lists(Lengths, min_size=1, max_size=4), room=st.integers(8, 90), most=st.one_of(st.none(), st.integers(1, 5)))
def test_every_row_once_with_its_silo(silos: list[list[int]], room: int, most: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "room", lambda: room)
        texts = [[e.prompt + e.answer for e in rows_of(n, 10 * s + 1)] for s, n in enumerate(silos)]
        batches = [class_batch([Encoded(text, [s]) for text in mine], 0) for s, mine in enumerate(texts)]
        found = pieces.cut(batches, 0, most)
    seen = []
    for piece, owner in found:
        count, width = piece.input_ids.shape
        assert count * width <= room or count == 1
        assert most is None or count <= most
        assert width - int(piece.attention_mask.sum(1).max()) < pieces.STEP
        assert piece.labels.tolist() == owner.tolist()
        for ids, mask, places in zip(piece.input_ids, piece.attention_mask, piece.position_ids, strict=True):
            kept = ids[mask.bool()]
            assert places[mask.bool()].tolist() == list(range(len(kept)))
            seen.append((int(kept[0]), len(kept)))
    assert sorted(seen) == sorted((10 * s + 1 + i, n) for s, lengths in enumerate(silos) for i, n in enumerate(lengths))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("architecture", "task"), [("llama", "rated"), ("llama", "written"), ("bert", "rated"), ("gpt2", "written")]
)
def test_gradients_add_up(
    resident_of: Callable[[str], Resident],
    architecture: str,
    task: str,
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silos: Mapping[str, SiloData] = request.getfixturevalue(task)
    base, method = resident_of(architecture), METHODS[kind]
    tuned = method.put_on(base, len(next(iter(silos.values())).labels))
    dice = torch.Generator().manual_seed(5)
    moved = {
        n: torch.stack([t + 0.02 * torch.randn(t.shape, generator=dice) for _ in silos])
        for n, t in method.initial(base, tuned, 3).items()
    }
    batches = [draw(base, data, Local((0.1,), batch_size=3), 7 + i, tuned.shift)[0][0] for i, data in enumerate(silos.values())]

    def steps() -> list[Any]:
        ones = [({n: t[s : s + 1] for n, t in moved.items()}, [one]) for s, one in enumerate(batches)]
        plain = [training._plain(tuned, tensors, {}, one, base, None) for tensors, one in ones]
        return [training._cohort(tuned, moved, {}, batches, base, None), *plain]

    whole = steps()
    monkeypatch.setattr(pieces, "room", lambda: 40)
    assert all(pieces.worth([one], CPU) for one in batches)
    taken: list[int] = []
    cut = pieces.cut
    monkeypatch.setattr(pieces, "cut", lambda *args: taken.append(1) or cut(*args))
    for (grads, nll, seen), (mine, my_nll, my_seen) in zip(whole, steps(), strict=True):
        for n, g in grads.items():
            assert torch.allclose(mine[n], g, rtol=1e-3, atol=2e-5 * max(1.0, float(g.abs().max()))), n
        assert my_nll.tolist() == pytest.approx(nll.tolist(), rel=1e-5)
        assert my_seen.tolist() == seen.tolist()
    assert len(taken) == 1 + len(batches)


def prefixed(base: Resident, silos: Mapping[str, SiloData]) -> tuple[Tuned, Tensors, list[Batch]]:
    """A prefix as it starts, and a batch of each silo."""
    tuned = METHODS["prefix"].put_on(base, 0)
    batches = [draw(base, data, Local((0.1,), batch_size=3), 7, tuned.shift)[0][0] for data in silos.values()]
    return tuned, METHODS["prefix"].initial(base, tuned, 3), batches


def test_tensors_too_large_for_a_copy_a_row_are_taken_silo_by_silo(
    llama: Resident, written: Mapping[str, SiloData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "room", lambda: 40)
    tuned, start, batches = prefixed(llama, written)
    tensors = {n: torch.stack([t] * 3) for n, t in start.items()}
    most: list[int | None] = []
    cut = pieces.cut
    monkeypatch.setattr(pieces, "cut", lambda some, pad, rows=None: most.append(rows) or cut(some, pad, rows))
    size = sum(t.numel() for t in start.values())
    for lanes in (pieces.LEAST - 1, pieces.LEAST):
        monkeypatch.setattr(pieces, "LANES", lanes * size)
        training._cohort(tuned, tensors, {}, batches, llama, None)
    assert most == [pieces.LEAST]


def test_a_silo_that_fails_leaves_the_others_alone(
    llama: Resident, written: Mapping[str, SiloData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "room", lambda: 40)
    tuned, start, batches = prefixed(llama, written)
    tensors = {n: torch.stack([t, t * float("nan"), t]) for n, t in start.items()}
    grads, nll, _ = training._cohort(tuned, tensors, {}, batches, llama, None)
    assert nll.isfinite().tolist() == [True, False, True]
    assert all(bool(g[[0, 2]].isfinite().all()) for g in grads.values())
