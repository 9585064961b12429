"""Divergences by hand; that a pupil is trained on what it answers; what silos say of text as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import consensus, distilling, training
from fedtailor.answering import Answers
from fedtailor.data import Row, SiloData
from fedtailor.distilling import NO_IDS, Pupil, Said, divergence, united
from fedtailor.methods.lora import Lora
from fedtailor.models import Resident
from fedtailor.training import Local

ROWS = tuple(Row(f"The {thing} was here.", "") for thing in ("bear", "old grey bear", "parcel", "tea of the day"))
WORDS = {"one token": ("a", "b"), "several": ("bad", "good"), "one begins the other": ("go", "good")}
residents = pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_divergences_by_hand() -> None:
    """KL(p || q) = .5 ln 2 + .5 ln 2/3, KL(q || p) = .25 ln .5 + .75 ln 1.5; the middle is (.375, .625)."""
    p, q = logs([0.5, 0.5]), logs([0.25, 0.75])
    assert divergence("forward", p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence("reverse", p, q).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    half = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    other = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert divergence("js", p, q).item() == pytest.approx((half + other) / 2)


@given(st.sampled_from(["forward", "reverse", "js"]), st.integers(0, 200))
def test_divergences_are_none_between_equals_and_positive_else(kind: Any, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 4, generator=dice).log_softmax(-1) for _ in range(2))
    assert torch.allclose(divergence(kind, p, p), torch.zeros(3), atol=1e-6)
    assert bool((divergence(kind, p, q) > 0).all())
    if kind == "js":
        assert torch.allclose(divergence(kind, p, q), divergence(kind, q, p), atol=1e-6)
        assert bool((divergence(kind, p, q) <= math.log(2)).all())


def test_the_rest_is_what_is_left() -> None:
    assert distilling.with_rest(logs([0.5, 0.25])).exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert distilling.with_rest(logs([0.7, 0.31])).exp()[0].sum().item() == pytest.approx(1), "rounded beyond 1"


def steps(count: int, size: int) -> Local:
    return Local((0.01,) * count, size)


def taught(resident: Resident, labels: tuple[str, ...], **more: Any) -> Pupil:
    return Pupil(resident, Lora(rank=2).put_on(resident, len(labels)), labels, **more)


@residents
@pytest.mark.parametrize("words", WORDS)
def test_a_pupil_is_trained_on_what_it_answers(
    resident_of: Callable[[str], Resident], architecture: str, words: str
) -> None:
    resident, labels = resident_of(architecture), WORDS[words]
    pupil = taught(resident, labels)
    tensors = Lora(rank=2).initial(resident, pupil.tuned, 1)
    expected = Answers(resident, pupil.tuned, tensors).scores([replace(row, answer=labels[0]) for row in ROWS], labels)
    found = pupil._logits(tensors, pupil._batch(ROWS))
    if resident.classifier:
        found = found.log_softmax(-1)
    assert torch.allclose(found.detach(), expected, atol=1e-4)


def test_of_a_model_that_writes_the_loss_is_over_all_that_it_could_have_said(llama: Resident) -> None:
    """Labels of one token: KL from (.3, .7) on their two tokens to the whole vocabulary."""
    pupil = taught(llama, ("a", "b"))
    said = Said(logs(*[[0.3, 0.7]] * len(ROWS)), NO_IDS)
    (lesson,) = pupil.lessons(ROWS, said, torch.ones(4, dtype=torch.bool), [1] * 4, steps(1, 4), 0)[0]
    loss, places = pupil.losses(None, lesson)
    words = Answers(llama, pupil.tuned, None).scores([replace(row, answer="a") for row in ROWS], ("a", "b"))
    expected = sum(p * (math.log(p) - words[:, i].double()) for i, p in enumerate((0.3, 0.7))).sum()  # type: ignore[union-attr]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert places.item() == 4


def test_of_text_everything_said_is_all_that_the_row_is_likely_by(llama: Resident) -> None:
    rows = [Row("The bear", "sleeps"), Row("The old grey bear", "eats tea")]
    model = Answers(llama, llama.tuned(), None)
    said = distilling.said(model, rows, (), 260, 1.0)
    counts = distilling.places(llama, rows, ())
    assert counts == [8, 10]  # bytes, with the space in front and the end
    assert said.logp.shape == said.ids.shape == (18, 260)
    assert bool((said.logp[:, 1:] <= said.logp[:, :-1]).all()), "the likeliest first"
    true = torch.cat([torch.tensor([*llama.tokenizer(f" {row.answer}").input_ids, llama.tokenizer.eos_token_id]) for row in rows])
    picked = said.logp[(said.ids == true[:, None])]
    totals = [picked[:8].sum().item(), picked[8:].sum().item()]
    assert totals == pytest.approx([total for total, _ in model.logprobs(rows)], abs=1e-4)
    few = distilling.said(model, rows, (), 3, 1.0)
    assert torch.equal(few.ids, said.ids[:, :3])


def test_lessons_are_drawn_in_turn_and_never_of_what_nobody_spoke_of(llama: Resident) -> None:
    pupil = taught(llama, ("a", "b"))
    said = Said(torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]).log(), NO_IDS)
    known = torch.tensor([True, False, True, True])
    drawn = pupil.lessons(ROWS, said, known, [1] * 4, steps(3, 2), 5)
    firsts = [round(p, 1) for step in drawn for p in step[0].said.logp.exp()[:, 0].tolist()]
    assert len(drawn) == 3
    assert sorted(firsts[:3]) == sorted(firsts[3:]) == [0.1, 0.3, 0.4]
    assert pupil.lessons(ROWS, said, torch.zeros(4, dtype=torch.bool), [1] * 4, steps(3, 2), 5) == []
    two = pupil.lessons(ROWS, said, known, [1] * 4, replace(steps(3, 2), accumulate=2), 5)
    assert [len(parts) for parts in two] == [2, 2, 2]


@residents
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_pupil_learns_what_is_said(resident_of: Callable[[str], Resident], architecture: str, kind: Any) -> None:
    resident, labels = resident_of(architecture), ("bad", "good")
    pupil, method = taught(resident, labels, kind=kind, temperature=2.0), Lora(rank=2, lr=0.03, local_steps=12, batch_size=4)
    said = Said(logs(*[[0.2, 0.8], [0.9, 0.1]] * 2), NO_IDS)
    start = method.initial(resident, pupil.tuned, 1)
    drawn = [pupil.lessons(ROWS, said, torch.ones(4, dtype=torch.bool), [1] * 4, steps(12, 4), 0)]
    how = method.local((0.03,) * 12)
    done = training.train(resident, pupil, start, [(SiloData((), (), ()), 0)], how, [{}], drawn=drawn)  # type: ignore[arg-type]
    (lesson,) = drawn[0][0]
    before, after = (float(pupil.losses(t, lesson)[0]) for t in (start, {n: t[0] for n, t in done.tensors.items()}))
    assert done.failed == [None]
    assert after < before - 0.01


def test_a_pupil_learns_what_is_said_of_text(llama: Resident) -> None:
    rows = [Row("The bear", "sleeps"), Row("The tea", "is cold")]
    pupil, method = taught(llama, ()), Lora(rank=2, lr=0.03, local_steps=12, batch_size=2)
    counts = distilling.places(llama, rows, ())
    dice = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(250, generator=dice)[:3] for _ in range(sum(counts))]).int()
    said = Said(logs(*[[0.6, 0.2, 0.1]] * sum(counts)), ids)
    known = torch.ones(sum(counts), dtype=torch.bool)
    known[2] = False
    drawn = [pupil.lessons(rows, said, known, counts, steps(12, 2), 0)]
    start = method.initial(llama, pupil.tuned, 1)
    done = training.train(llama, pupil, start, [(SiloData((), (), ()), 0)], method.local((0.03,) * 12), [{}], drawn=drawn)  # type: ignore[arg-type]
    (lesson,) = drawn[0][0]
    assert float(pupil.losses(start, lesson)[1]) == sum(counts) - 1, "a place that nobody spoke of carries no loss"
    assert done.loss[0] < float(pupil.losses(start, lesson)[0] / (sum(counts) - 1))


def test_what_two_silos_say_of_text_as_one() -> None:
    """Place 0: tokens 5 and 7 of one, 7 and 9 of the other: the means are .25, (.2 + .6) / 2, .15. At place 1 one is silent."""
    one = Said(logs([0.5, 0.2], [0.6, 0.3]), torch.tensor([[5, 7], [1, 2]], dtype=torch.int32))
    other = Said(logs([0.6, 0.3], [0.9, 0.05]), torch.tensor([[7, 9], [3, 4]], dtype=torch.int32))
    spoken = torch.tensor([[True, True], [True, False]])
    whole, known = united([one, other], 2, consensus.mean, spoken, torch.zeros(spoken.shape))
    assert known.tolist() == [True, True]
    assert whole.ids.tolist() == [[7, 5], [1, 2]]
    assert whole.logp.exp()[0].tolist() == pytest.approx([0.4, 0.25], abs=1e-4)
    assert whole.logp.exp()[1].tolist() == pytest.approx([0.6, 0.3], abs=1e-4)


def test_what_two_silos_say_of_labels_as_one() -> None:
    one, other = Said(logs([0.9, 0.1]).half(), NO_IDS), Said(logs([0.5, 0.5]).half(), NO_IDS)
    whole, known = united([one, other], 8, consensus.mean, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1))
    assert whole.logp.exp()[0].tolist() == pytest.approx([0.7, 0.3], abs=1e-3)
    assert known.tolist() == [True]


@given(st.sampled_from(sorted(consensus.names())), st.booleans())
def test_what_a_silo_does_not_speak_of_changes_nothing(name: str, text: bool) -> None:
    ids = torch.tensor([[5, 7], [1, 2]], dtype=torch.int32) if text else NO_IDS
    one = Said(logs([0.5, 0.5], [0.6, 0.4]), ids)
    spoken = torch.tensor([[True, True], [True, False]])
    found = []
    for rubbish in ([math.nan, math.nan], [0.0, 1.0]):
        other = Said(torch.cat([logs([0.7, 0.3]), torch.tensor([rubbish]).log()]), ids)
        found.append(united([one, other], 2, consensus.find(name), spoken, torch.tensor([[0.5], [0.6]]).expand(spoken.shape))[0])
    assert torch.allclose(found[0].logp, found[1].logp)
    assert bool(found[0].logp.isfinite().all())


def test_the_truth_blended_in_by_hand() -> None:
    """Half of it to token 7, which is there; half to 9, which is not, and takes the place of the last."""
    said = Said(logs([0.5, 0.2], [0.6, 0.3]), torch.tensor([[5, 7], [1, 2]], dtype=torch.int32))
    found = distilling.blended(said, torch.tensor([7, 9], dtype=torch.int32), 0.5)
    assert found.ids.tolist() == [[5, 7], [1, 9]]
    assert found.logp.exp()[0].tolist() == pytest.approx([0.25, 0.6])
    assert found.logp.exp()[1].tolist() == pytest.approx([0.3, 0.5])
