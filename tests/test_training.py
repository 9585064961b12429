"""The local loop: the cohort step against the plain one, and both against torch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import training
from fedtailor.answering import encode
from fedtailor.data import Row, SiloData
from fedtailor.errors import SiloError
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Base, Resident, load, resident
from fedtailor.tiny import byte_tokenizer, tiny
from fedtailor.training import Local, Outcome, draw, moments_of, schedule, train
from fedtailor.tuned import IGNORED, Tensors

SEED = 11
METHODS = {
    "prefix": Prefix(virtual_tokens=4),
    "projected": Prefix(virtual_tokens=4, projection=True, projection_size=16, lr=3e-3),
    "lora": Lora(rank=2),
    "full": Full(),
}
Silos = Mapping[str, SiloData]


def prepared(base: Resident, method: Averaging, labels: int) -> tuple[Any, Tensors]:
    """Started, and moved a little: a LoRA whose B is zero has no gradient in A."""
    tuned = method.put_on(base, labels)
    start = method.initial(base, tuned, 3)
    dice = torch.Generator().manual_seed(5)
    moved = {n: t + 0.02 * torch.randn(t.shape, generator=dice) for n, t in start.items()}
    return method.put_on(base, labels), moved


def both(base: Resident, method: Averaging, silos: Silos, how: Local, moments: Sequence[Tensors] | None = None) -> tuple[
    Outcome, list[Outcome]
]:  # fmt: skip
    """All silos in one pass, and one after the other."""
    tuned, start = prepared(base, method, len(next(iter(silos.values())).labels))
    each = [(data, SEED + i) for i, data in enumerate(silos.values())]
    moments = moments or [{}] * len(each)
    together = train(base, tuned, start, each, how, moments)
    apart = [train(base, tuned, start, [one], how, [m]) for one, m in zip(each, moments, strict=True)]
    return together, apart


def difference(together: Outcome, apart: Sequence[Outcome]) -> float:
    return max(
        (t[s] - one.tensors[n][0]).abs().max().item() for s, one in enumerate(apart) for n, t in together.tensors.items()
    )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("architecture", "task"),
    [("llama", "rated"), ("llama", "written"), ("gpt2", "rated"), ("gpt2", "written"), ("bert", "rated")],
)
def test_a_cohort_of_silos_trains_as_one_silo_after_the_other(
    resident_of: Callable[[str], Resident], architecture: str, kind: str, task: str, request: pytest.FixtureRequest
) -> None:
    silos: Silos = request.getfixturevalue(task)
    method, any_resident = METHODS[kind], resident_of(architecture)
    together, apart = both(any_resident, method, silos, Local((method.lr,) * 10, batch_size=2))
    assert difference(together, apart) < 1e-5
    assert together.loss == pytest.approx([one.loss[0] for one in apart], abs=1e-5)
    assert together.places == [one.places[0] for one in apart]
    assert together.failed == [None] * 3
    # and the silos went different ways, far from where they began
    _, start = prepared(any_resident, method, len(next(iter(silos.values())).labels))
    apart_by = {n: (t[0] - t[1]).abs().max().item() for n, t in together.tensors.items()}
    gone = {n: (t[0] - start[n]).abs().max().item() for n, t in together.tensors.items()}
    if kind == "full":  # of all weights some have no gradient at all, such as the bias of the keys
        apart_by, gone = {"any": max(apart_by.values())}, {"any": max(gone.values())}
    assert min(apart_by.values()) > 1e-4, apart_by
    assert min(gone.values()) > 1e-4, gone


SETTINGS = {
    "sgd": Local((0.1,) * 10, batch_size=2, optimizer="sgd"),
    "sgd, unclipped": Local((0.1,) * 10, batch_size=2, optimizer="sgd", clip=0),
    "accumulated": Local((2e-3,) * 5, batch_size=2, accumulate=3),
    "prox": Local((2e-3,) * 10, batch_size=2, prox=0.5),
    "decayed, clipped hard": Local((2e-3,) * 10, batch_size=3, weight_decay=0.1, clip=0.01),
    "changing rate": Local(tuple(1e-3 * i for i in range(8)), batch_size=1),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_a_cohort_with_other_settings(llama: Resident, written: Silos, kind: str, setting: str) -> None:
    together, apart = both(llama, METHODS[kind], written, SETTINGS[setting])
    assert difference(together, apart) < 1e-5
    assert together.loss == pytest.approx([one.loss[0] for one in apart], abs=1e-5)


def test_a_cohort_whose_silos_have_taken_different_numbers_of_steps(llama: Resident, written: Silos) -> None:
    method, how = METHODS["lora"], Local((2e-3,) * 5, batch_size=2)
    tuned, start = prepared(llama, method, 0)
    kept: list[Tensors] = []
    for steps, data in zip((0, 3, 7), written.values(), strict=True):
        before = train(llama, tuned, start, [(data, 1)], replace(how, lrs=(2e-3,) * steps), [{}])
        kept.append(moments_of(before, 0) if steps else {})
    together, apart = both(llama, method, written, how, kept)
    assert difference(together, apart) < 1e-5
    assert all(t.tolist() == [5, 8, 12] for n, t in together.moments.items() if n.startswith("step/"))
    fresh, _ = both(llama, method, written, how)
    assert difference(fresh, apart[:1]) < 1e-5
    assert (fresh.tensors[next(iter(start))][2] - together.tensors[next(iter(start))][2]).abs().max() > 1e-5


def by_torch(base: Resident, method: Averaging, data: SiloData, how: Local) -> tuple[Tensors, float]:
    """The same steps with torch.optim and torch's own clipping."""
    tuned, start = prepared(base, method, len(data.labels))
    parameters = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    kind = torch.optim.AdamW if how.optimizer == "adamw" else torch.optim.SGD
    more = {} if how.optimizer == "sgd" else {"weight_decay": how.weight_decay}
    optimizer = kind(parameters.values(), lr=1.0, **more)
    total = places = 0.0
    for lr, passes in zip(how.lrs, draw(base, data, how, SEED), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        step_places = 0.0
        for one in passes:  # one after the other, as a silo does: AdamW would make more of another order's rounding
            nll, seen = tuned.losses(parameters, one)
            nll.backward()
            total, step_places = total + nll.item(), step_places + seen.item()
        places += step_places
        for p in parameters.values():
            if p.grad is not None:
                p.grad /= step_places
        for n, p in parameters.items():
            if how.prox and p.grad is not None:
                p.grad += how.prox * (p.detach() - start[n])
        if how.clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), how.clip)
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}, total / places


@pytest.mark.parametrize(
    "how",
    [
        Local((2e-3,) * 10, batch_size=2, clip=0),
        Local((2e-3,) * 10, batch_size=2, clip=0.02, weight_decay=0.3),
        Local(tuple(1e-3 * (10 - i) for i in range(10)), batch_size=2, accumulate=2),
        Local((2e-3,) * 10, batch_size=2, prox=0.7),
        Local((0.2,) * 10, batch_size=2, optimizer="sgd", clip=0),
        Local((0.2,) * 10, batch_size=2, optimizer="sgd", clip=0.02),
    ],
    ids=["adamw", "adamw clipped and decayed", "adamw accumulated", "adamw prox", "sgd", "sgd clipped"],
)
@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_ten_steps_are_those_of_torchs_optimizers(llama: Resident, written: Silos, kind: str, how: Local) -> None:
    data = written["shop"]
    expected, loss = by_torch(llama, METHODS[kind], data, how)
    tuned, start = prepared(llama, METHODS[kind], 0)
    done = train(llama, tuned, start, [(data, SEED)], how, [{}])
    for n, t in expected.items():
        assert torch.allclose(done.tensors[n][0], t, atol=2e-6), n
    assert max((t - start[n]).abs().max().item() for n, t in expected.items()) > 1e-3
    assert done.loss[0] == pytest.approx(loss, rel=1e-5)


def test_weight_decay_of_sgd_is_decoupled(llama: Resident, written: Silos) -> None:
    """One step: (1 - lr * decay) * start - lr * gradient, whereas torch's SGD would add the decay to the gradient."""
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    how = Local((0.5,), batch_size=2, optimizer="sgd", clip=0)
    one = [(written["cafe"], 1)]
    plain = train(llama, tuned, start, one, how, [{}]).tensors
    decayed = train(llama, tuned, start, one, replace(how, weight_decay=0.2), [{}]).tensors
    for n, t in start.items():
        assert torch.allclose(decayed[n][0], plain[n][0] - 0.5 * 0.2 * t, atol=1e-6)


def test_clipping_matters_only_above_the_limit(llama: Resident, written: Silos) -> None:
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    how = Local((1.0,), batch_size=4, optimizer="sgd", clip=0)
    one = [(written["zoo"], 1)]

    def step(limit: float) -> float:
        done = train(llama, tuned, start, one, replace(how, clip=limit), [{}]).tensors
        return torch.stack([(t[0] - start[n]).norm() for n, t in done.items()]).norm().item()

    free = step(0)
    assert step(free * 2) == pytest.approx(free, rel=1e-4)
    assert step(free / 4) == pytest.approx(free / 4, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_passes_of_four_rows_are_one_of_eight(llama: Resident, rated: Silos, optimizer: Any) -> None:
    """The same rows (one step, one seed): their mean is over all places of the step, not a mean of means."""
    data = replace(rated["shop"], train=rated["shop"].train + rated["zoo"].train[:2], labels=())
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    how = Local((1e-2,), batch_size=8, optimizer=optimizer)
    whole = train(llama, tuned, start, [(data, 5)], how, [{}])
    parts = train(llama, tuned, start, [(data, 5)], replace(how, batch_size=4, accumulate=2), [{}])
    assert len({tuple(b.labels.shape) for (b, *_) in draw(llama, data, how, 5)}) == 1
    for n, t in whole.tensors.items():
        assert torch.allclose(parts.tensors[n], t, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.places == whole.places


def told(base: Resident, steps: Any) -> list[tuple[int, ...]]:
    """Rows of drawn batches as their tokens without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for passes in steps for one in passes for ids, mask in zip(one.input_ids, one.attention_mask, strict=True)
    ]  # fmt: skip


@given(rows=st.integers(1, 9), steps=st.integers(1, 4), size=st.integers(1, 4), passes=st.integers(1, 2))
def test_every_row_once_before_any_row_twice(rows: int, steps: int, size: int, passes: int) -> None:
    base = _BASE
    data = SiloData(tuple(Row(f"{i} " + "x" * (i % 4), "y") for i in range(rows)), (), ())
    how = Local((0.1,) * steps, batch_size=size, accumulate=passes)
    drawn = draw(base, data, how, seed=3)
    assert [len(one) for one in drawn] == [passes] * steps
    assert all(one.input_ids.shape[0] == size for many in drawn for one in many)
    counts = {tuple(i.prompt + i.answer): 0 for i in encode(base, data.train, stop=True)}
    for row in told(base, drawn):
        counts[row] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(counts.values()) == steps * size * passes


_BASE = tiny("float32")


def test_drawing_is_seeded(llama: Resident, written: Silos) -> None:
    how = Local((0.1,) * 2, batch_size=2)
    first = told(llama, draw(llama, written["zoo"], how, 1))
    torch.manual_seed(0)
    assert told(llama, draw(llama, written["zoo"], how, 1)) == first
    assert len({tuple(told(llama, draw(llama, written["zoo"], how, seed))) for seed in range(9)}) > 3


def test_rows_of_like_length_share_a_batch(llama: Resident) -> None:
    data = SiloData(tuple(Row("x" * n, "y") for n in (1, 50, 2, 51, 3, 52)), (), ())
    drawn = draw(llama, data, Local((0.1,) * 2, batch_size=3), 0)
    assert sorted(one.input_ids.shape[1] for (one,) in drawn) == [3 + 3, 52 + 3]  # " y" and the end


def test_classification_trains_the_word_alone_and_generation_its_end_too(llama: Resident, rated: Silos) -> None:
    how = Local((0.1,), batch_size=6)
    ((word,),) = draw(llama, rated["cafe"], how, 0)
    ((text,),) = draw(llama, replace(rated["cafe"], labels=()), how, 0)
    assert (text.labels == 257).sum() == 6
    assert (word.labels == 257).sum() == 0
    assert (text.labels != IGNORED).sum() == (word.labels != IGNORED).sum() + 6


def test_a_row_too_long_for_context_and_prefix(llama: Resident) -> None:
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    fits, long = (SiloData((Row("p" * n, "y", "row-9"),), (), ()) for n in (505, 506))  # + 3 tokens + 4 virtual ones
    train(llama, tuned, start, [(fits, 1)], Local((0.1,), batch_size=1), [{}])
    with pytest.raises(SiloError, match="a row has"):
        train(llama, tuned, start, [(long, 1)], Local((0.1,), batch_size=1), [{}])


def broken() -> Resident:
    """Weights that give NaN beyond place 30: only rows that are longer see them."""
    module = tiny("float32", "gpt2").module
    with torch.no_grad():
        module.transformer.wpe.weight[30:] = math.nan
    return resident(module, byte_tokenizer(), source="broken", kind="causal")


def test_a_nan_in_one_silo_is_that_silos_alone() -> None:
    base, method = broken(), METHODS["lora"]
    short = {n: SiloData(tuple(Row(f"{n} {i}", "yes", "") for i in range(4)), (), ()) for n in "ac"}
    long = SiloData(tuple(Row(f"b {i} " + "x" * 40, "yes", "") for i in range(4)), (), ())
    how = Local((0.1,) * 4, batch_size=2, optimizer="sgd")
    together, apart = both(base, method, {"a": short["a"], "b": long, "c": short["c"]}, how)
    assert together.failed[0] is None
    assert together.failed[2] is None
    assert together.failed[1] is not None
    assert together.failed[1].startswith("the loss became nan at local step 1")
    assert apart[1].failed == [together.failed[1]]
    for s in (0, 2):
        assert all((t[s] - apart[s].tensors[n][0]).abs().max() < 1e-6 for n, t in together.tensors.items())
        assert math.isfinite(together.loss[s])
        assert together.loss[s] == pytest.approx(apart[s].loss[0], abs=1e-5)


def test_a_silo_that_diverges_leaves_the_others_bit_for_bit(llama: Resident, written: Silos) -> None:
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    each = [(data, SEED) for data in written.values()]
    how = Local((1e-2,) * 4, batch_size=2)
    ruined = {f"m/{n}": torch.full_like(t, math.inf) for n, t in start.items()}
    sound = train(llama, tuned, start, each, how, [{}, {}, {}])
    done = train(llama, tuned, start, each, how, [{}, ruined, {}])
    assert done.failed[1] is not None
    assert "step 2" in done.failed[1]
    assert (done.failed[0], done.failed[2]) == (None, None)
    for s in (0, 2):
        assert all(torch.equal(t[s], sound.tensors[n][s]) for n, t in done.tensors.items())
        assert all(torch.equal(t[s], sound.moments[n][s]) for n, t in done.moments.items())
        assert done.loss[s] == sound.loss[s]


def test_a_last_step_that_ruins_the_tensors_is_a_failure(llama: Resident, written: Silos) -> None:
    """Moments that are no numbers: the loss before the only step is fine, the tensors after it are not."""
    tuned, start = prepared(llama, METHODS["prefix"], 0)
    ruined = {f"m/{n}": torch.full_like(t, math.nan) for n, t in start.items()}
    done = train(llama, tuned, start, [(written["zoo"], 1)], Local((1e-2,), batch_size=2), [ruined])
    assert math.isfinite(done.loss[0])
    assert done.failed[0] is not None
    assert "not finite" in done.failed[0]


def test_plain_training_is_bit_for_bit_repeatable(any_resident: Resident, rated: Silos) -> None:
    for kind, method in METHODS.items():
        tuned, start = prepared(any_resident, method, 2)
        before = {n: t.clone() for n, t in start.items()}
        runs = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            runs.append(train(any_resident, tuned, start, [(rated["zoo"], 7)], Local((1e-3,) * 3, 2), [{}]))
        assert all(torch.equal(t, runs[1].tensors[n]) for n, t in runs[0].tensors.items()), kind
        assert all(torch.equal(t, before[n]) for n, t in start.items()), "the start was written to"


def test_dropout_masks_come_from_the_silos_seed(llama: Resident, written: Silos) -> None:
    method = Lora(rank=2, dropout=0.5)
    tuned, start = prepared(llama, method, 0)
    how = Local((2e-3,) * 3, batch_size=2, dropout=True)

    def trained(noise: int, dropout: bool = True) -> Tensors:
        torch.manual_seed(noise)
        return train(llama, tuned, start, [(written["zoo"], 7)], replace(how, dropout=dropout), [{}]).tensors

    first = trained(1)
    assert all(torch.equal(t, first[n]) for n, t in trained(2).items())
    assert any(not torch.equal(t, first[n]) for n, t in trained(1, dropout=False).items())
    each = [[(written["zoo"], seed)] for seed in (7, 8)]
    same_rows = Local((2e-3,), batch_size=6, dropout=True)  # one step over all six: only the masks differ by seed
    a, b = (train(llama, tuned, start, one, same_rows, [{}]).tensors for one in each)
    assert any((t - b[n]).abs().max() > 1e-4 for n, t in a.items())


def test_kept_moments_continue_where_they_stopped(llama: Resident) -> None:
    """Two and then three steps with the state kept are those five of torch that see the same rows."""
    method = METHODS["lora"]
    data = SiloData(tuple(Row(f"{i} to the bear:", "a fish") for i in range(6)), (), ())
    tuned, start = prepared(llama, method, 0)
    how = Local((2e-3,) * 2, batch_size=6)  # rows of one length: all six in every step
    first = train(llama, tuned, start, [(data, 1)], how, [{}])
    middle = {n: t[0] for n, t in first.tensors.items()}
    kept = train(llama, tuned, middle, [(data, 2)], replace(how, lrs=(2e-3,) * 3), [moments_of(first, 0)])
    whole, _ = by_torch(llama, method, data, replace(how, lrs=(2e-3,) * 5))
    assert all(torch.allclose(kept.tensors[n][0], t, atol=2e-6) for n, t in whole.items())
    assert {t.item() for n, t in kept.moments.items() if n.startswith("step/")} == {5}
    reset = train(llama, tuned, middle, [(data, 2)], replace(how, lrs=(2e-3,) * 3), [{}])
    assert any((reset.tensors[n][0] - t).abs().max() > 1e-4 for n, t in whole.items())


def test_schedule_by_hand() -> None:
    assert [schedule("constant", x, 0) for x in (0, 0.5, 1)] == [1, 1, 1]
    assert [schedule("linear", x, 0) for x in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [schedule("cosine", x, 0) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert schedule("cosine", 0.25, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    # a fifth of warm-up, then the rest from 1 to 0
    assert [schedule("linear", x, 0.2) for x in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1), st.floats(0, 1))
def test_a_schedule_stays_between_0_and_1(kind: str, at: float, warmup: float) -> None:
    assert -1e-9 <= schedule(kind, at, warmup) <= 1


def test_short_rows_in_bf16_take_plain_attention(written: Silos) -> None:
    def fused(base: Resident, batch_of: int) -> bool:
        (batch,) = draw(base, written["shop"], Local((0.1,), batch_size=batch_of), SEED)[0]
        with training._attention(batch, base):
            return torch.backends.cuda.flash_sdp_enabled()  # told of every device, whatever its name

    half, whole = (load(Base("tiny", dtype=kind)) for kind in ("bfloat16", "float32"))
    assert (fused(half, 2), fused(whole, 2)) == (False, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SHORT", 3)
        assert fused(half, 2)
