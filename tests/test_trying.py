"""Candidates tried on a silo's rows: the sums are those of the rows, and nothing but sums leaves."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtailor.baselines import POOLED, pooled
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.errors import SiloError
from fedtailor.limits import TOLD, Limits
from fedtailor.models import Resident
from fedtailor.prefixes import Prefixes
from fedtailor.privacy import Noise, noise
from fedtailor.prompts import Prompt
from fedtailor.trying import GRID, Score, Tried, Try, attempt, scored, try_many
from judged import LABELS, PROMPTS, judged

POOL = tuple(map(Prompt, PROMPTS[:4]))
ALL = tuple((0, 1000) for _ in POOL)


def silos_of(base: Resident, data: dict[str, SiloData], seed: int = 1) -> list[Silo]:
    return [Silo(name, rows, {"base": base}, seed + i) for i, (name, rows) in enumerate(data.items())]


@pytest.mark.parametrize("score", ["probability", "accuracy"])
def test_a_sum_is_that_of_the_rows(llama: Resident, score: Score) -> None:
    """Row by row, from the served model's own scores."""
    data = judged(rows=9, silos=1)
    (silo,) = silos_of(llama, data)
    found = attempt(silo, Try(POOL, ALL, 7, score))
    assert found.counts.tolist() == [9] * len(POOL)
    for c, prompt in enumerate(POOL):
        one_by_one = []
        for row in silo.data.train:
            told = prompt.told(row, LABELS)
            model = Prompt("{input}")  # already asked: as it is
            one_by_one.append(scored(llama, model, LABELS, [told], score, Prefixes()))
        values = torch.cat(one_by_one)
        assert found.sums[c].item() == pytest.approx(values.sum().item(), abs=1e-5)
        assert found.squares[c].item() == pytest.approx(values.square().sum().item(), abs=1e-5)
        assert bool(((values >= 0) & (values <= 1)).all())
        assert torch.equal(values * GRID, (values * GRID).round())


@pytest.mark.parametrize("score", ["probability", "accuracy"])
def test_federated_sums_are_the_pooled_ones_exactly(llama: Resident, score: Score) -> None:
    """Every candidate on every row: silo by silo added up, or all rows in one place: the same sums to the last bit."""
    data = judged(rows=20)
    federated = try_many(silos_of(llama, data), Try(POOL, ALL, 7, score))
    (centralized,) = try_many([Silo(POOLED, pooled(data)[POOLED], {"base": llama}, 3)], Try(POOL, ALL, 99, score))
    assert torch.equal(sum(one.sums for one in federated), centralized.sums)
    assert torch.equal(sum(one.squares for one in federated), centralized.squares)
    assert torch.equal(sum(one.counts for one in federated), centralized.counts)
    apart = [attempt(silo, Try(POOL, ALL, 7, score)) for silo in silos_of(llama, data)]
    near = 0.0 if score == "accuracy" else 1e-5  # other batches round a probability otherwise
    assert torch.allclose(torch.stack([one.sums for one in apart]).sum(0), centralized.sums, atol=near, rtol=0)


def test_windows_are_parts_of_one_order(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    whole = attempt(silo, Try(POOL[:1], ((0, 12),), 7))
    silo = replace(silo, memory={})
    parts = [attempt(silo, Try(POOL[:1], ((a, b),), 7)) for a, b in ((0, 5), (5, 9), (9, 40))]
    assert [int(part.counts[0]) for part in parts] == [5, 4, 3]
    assert sum(float(part.sums[0]) for part in parts) == pytest.approx(float(whole.sums[0]), abs=1e-5)
    again = attempt(replace(silo, seed=99), Try(POOL[:1], ((0, 5),), 7))
    assert torch.equal(again.sums, parts[0].sums)  # the order is the search's, not the ask's
    assert not torch.equal(attempt(replace(silo, memory={}), Try(POOL[:1], ((0, 5),), 8)).sums, again.sums)


def test_a_silo_says_nothing_of_few_rows(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    some = attempt(silo, Try(POOL[:2], ((0, 8), (8, 40)), 7, minimum=8))
    assert some.counts.tolist() == [8, 0]
    assert some.sums[1] == 0
    own = replace(silo, data=replace(silo.data, settings={"minimum": 9}))  # its own floor counts where it is higher
    assert attempt(own, Try(POOL[:2], ((0, 8), (0, 12)), 7, minimum=2)).counts.tolist() == [0, 12]
    with pytest.raises(SiloError, match="fewer rows than the minimum of 13"):
        attempt(silo, Try(POOL, ALL, 7, minimum=13))


def test_a_candidate_too_long_for_some_row_is_told_and_not_tried(llama: Resident) -> None:
    data = judged(rows=6, silos=1)["silo-0"]
    long = replace(data, test=(*data.test, Row("y" * 400, "good")))  # a row of the test set: served, it would fail there
    silo = Silo("silo-0", long, {"base": llama}, 1)
    found = attempt(silo, Try((Prompt("{input}"), Prompt("x" * 120 + "{input}")), ALL[:2], 7))
    assert found.unfit == (False, True)
    assert found.counts.tolist() == [6, 0]


def test_words_that_fit_other_labels_are_refused(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=6, silos=1))
    with pytest.raises(SiloError, match="2 labels"):
        attempt(silo, Try((Prompt("{input}", ("a", "b", "c")),), ALL[:1], 7))


def test_written_answers_are_scored_by_their_tokens(causal: Resident, written: dict[str, SiloData]) -> None:
    """The geometric mean of the tokens' probabilities: exp of the mean log-probability."""
    silo = Silo("cafe", written["cafe"], {"base": causal}, 1)
    found = attempt(silo, Try((Prompt("{input}"),), ALL[:1], 7))
    likely = Prompt("{input}")
    rows = [likely.told(row) for row in silo.data.train]
    from fedtailor.answering import fresh

    by_hand = sum(math.exp(total / places) for total, places in fresh(causal).logprobs(rows))
    assert found.sums[0].item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("kind", ["laplace", "gaussian"])
def test_noise_is_added_inside_and_paid_for(llama: Resident, kind: Any) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    how = noise(kind, 4.0, 1e-5, 3)
    body = Try(POOL[:2], ((0, 12), (0, 6)), 7, noise=how, repeatable=True)
    found = attempt(silo, body)
    assert found.problem(body) is None
    assert len(found.squares) == 0  # another number of each row's would cost more
    clear = attempt(replace(silo, memory={}), replace(body, noise=Noise())).sums
    assert torch.equal(found.sums, how.on(clear, silo.seed))
    assert found.epsilon == pytest.approx(how.spent(2))  # six rows are in both sums
    more = attempt(silo, Try(POOL[:1], ((6, 12),), 7, noise=how))
    assert more.epsilon == pytest.approx(how.spent(2))  # these had told one sum so far
    assert attempt(silo, Try(POOL[2:3], ((0, 3),), 7, noise=how)).epsilon == pytest.approx(4.0)
    before = copy.deepcopy(silo.memory)
    with pytest.raises(SiloError, match=r"epsilon = .* more than 4"):
        attempt(silo, Try(POOL[3:], ((0, 3),), 7, noise=how))
    assert torch.equal(silo.memory[TOLD]["spent"][kind], before[TOLD]["spent"][kind])
    assert silo.memory[TOLD]["windows"] == before[TOLD]["windows"]


def test_a_silo_may_spend_less_than_it_is_asked_to(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    careful = replace(silo, data=replace(silo.data, settings={"epsilon": 1.0}))
    with pytest.raises(SiloError, match="more than 1"):
        attempt(careful, Try(POOL, ALL, 7, noise=noise("laplace", 4.0, 1e-5, 4)))


def test_noise_of_the_system_cannot_be_taken_off(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    body = Try(POOL[:1], ((0, 12),), 7, noise=noise("laplace", 4.0, 1e-5, 4))
    one, other = (attempt(replace(silo, memory={}), body).sums for _ in range(2))
    assert not torch.equal(one, other)


def good() -> Tried:
    return Tried(
        torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([1.5, 1.0], dtype=torch.float64), torch.tensor([4, 4]),
        (False, False),
    )  # fmt: skip


def changed(**more: Any) -> Tried:
    return replace(good(), **more)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (good(), None),
        (changed(sums=torch.zeros(3, dtype=torch.float64)), "candidates"),
        (changed(unfit=(False,)), "candidates"),
        (changed(squares=torch.zeros(0, dtype=torch.float64)), "candidates"),
        (changed(sums=torch.tensor([2.0, 1.0])), "float64"),
        (changed(counts=torch.tensor([4, 4], dtype=torch.int32)), "int64"),
        (changed(sums=torch.tensor([math.nan, 1.0], dtype=torch.float64)), "not finite"),
        (changed(counts=torch.tensor([4, 5])), "more rows than asked"),
        (changed(counts=torch.tensor([4, -1])), "more rows than asked"),
        (changed(sums=torch.tensor([5.0, 1.0], dtype=torch.float64)), "out of bounds"),
        (changed(squares=torch.tensor([3.0, 1.0], dtype=torch.float64)), "out of bounds"),
        (changed(squares=torch.tensor([-1.0, 1.0], dtype=torch.float64)), "out of bounds"),
    ],
)
def test_a_reply_checks_itself(reply: Tried, why: str | None) -> None:
    found = reply.problem(Try(POOL[:2], ((0, 4), (2, 6)), 7))
    assert found is None if why is None else why in str(found)


def test_what_a_row_has_told_adds_up_at_each_sums_own_scale(llama: Resident) -> None:
    """Laplace 1/2 and 1/4 of a row, and Gaussian rho = 1/8: at its own scale each, not all at the last one's."""
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    for prompt, how in zip(POOL, (Noise("laplace", 2.0, 9.0), Noise("laplace", 4.0, 9.0)), strict=False):
        found = attempt(silo, Try((prompt,), ALL[:1], 7, noise=how))
    assert found.epsilon == pytest.approx(0.75)
    delta = math.exp(-4)
    silo = replace(silo, data=replace(silo.data, limits=Limits(delta=0.5)))
    found = attempt(silo, Try(POOL[2:3], ALL[:1], 7, noise=Noise("gaussian", 2.0, 9.0, delta)))
    assert found.epsilon == pytest.approx(0.75 + 1 / 8 + 2 * math.sqrt(4 / 8))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (Noise("laplace", 0.0, 1.0), "scale 0.0 and epsilon 1.0: both must be above 0"),
        (Noise("laplace", math.inf, 1.0), "both must be above 0"),
        (Noise("laplace", 1.0, math.nan), "both must be above 0"),
        (Noise("gaussian", 1.0, 9.0, 0.0), "delta = 0.0 must lie between 0 and 1"),
        (Noise("gaussian", 1.0, 9.0, 1 - 1e-12), r"above the 0.001 that it allows: lower method.delta"),
        (Noise("gumbel", 1.0, 9.0), "no such noise"),  # type: ignore[arg-type]
    ],
)
def test_noise_that_hides_nothing_is_refused(llama: Resident, how: Noise, why: str) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    with pytest.raises(SiloError, match=why):
        attempt(silo, Try(POOL[:1], ALL[:1], 7, noise=how))


@pytest.mark.parametrize("whose", ["owner", "experiment"])
def test_a_silo_with_an_epsilon_says_nothing_without_noise(llama: Resident, whose: str) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    more: Any = {"limits": Limits(epsilon=4.0)} if whose == "owner" else {"settings": {"epsilon": 4.0}}
    silo = replace(silo, data=replace(silo.data, **more))
    with pytest.raises(SiloError, match=r"under noise alone \(epsilon 4 at most\): set method.noise"):
        attempt(silo, Try(POOL[:1], ALL[:1], 7))
    assert attempt(silo, Try(POOL[:1], ALL[:1], 7, noise=Noise("laplace", 2.0, 9.0))).epsilon == 0.5


def test_no_two_windows_of_a_prompt_differ_by_fewer_rows_than_the_minimum(llama: Resident) -> None:
    """Two sums over rows but for one would tell that row."""
    (silo,) = silos_of(llama, judged(rows=12, silos=1))

    def asked(*windows: tuple[int, int], prompts: tuple[Prompt, ...] = POOL[:1]) -> Tried:
        return attempt(silo, Try(prompts, windows, 7, minimum=2))

    first = asked((0, 6))
    assert torch.equal(asked((0, 6)).sums, first.sums)
    for window in ((0, 5), (1, 6), (0, 7)):
        found = asked(window)
        assert (found.counts.tolist(), found.more) == ([0], (True,))
    assert asked((0, 8)).counts.tolist() == [8], "a reply that was lost is made good: 6 and 2 rows"
    assert (asked((1, 10)).counts.tolist(), asked((7, 10)).counts.tolist()) == ([2], [0])
    assert asked((10, 40)).counts.tolist() == [2]
    assert asked((0, 5), (0, 6), prompts=(POOL[1], POOL[1])).counts.tolist() == [5, 0]
    with pytest.raises(SiloError, match="in another order before"):
        attempt(silo, Try(POOL[:1], ((9, 12),), 8))
    with pytest.raises(SiloError, match=r"windows \(\(-3, 12\),\)"):
        asked((-3, 12))


def test_noise_drawn_anew_on_the_same_window_is_not_given_away(llama: Resident) -> None:
    (silo,) = silos_of(llama, judged(rows=12, silos=1))
    body = Try(POOL[:1], ((0, 6),), 7, noise=noise("laplace", 4.0, 1e-5, 2))
    assert attempt(silo, body).counts.tolist() == [6]
    again = attempt(silo, body)
    assert (again.counts.tolist(), again.sums.tolist(), again.epsilon) == ([0], [0.0], 2.0)


def test_under_noise_no_flag_tells_that_a_row_is_long(llama: Resident) -> None:
    """It scores 0, so that the sum says no more of it than of any other row."""
    rows = judged(rows=6, silos=1)["silo-0"]
    data = replace(rows, train=(*rows.train[:-1], Row("y" * 505, "good")))
    short = Silo("silo-0", replace(rows, train=rows.train[:-1]), {"base": llama}, 1)
    silo = Silo("silo-0", data, {"base": llama}, 1)
    prompt = Prompt("x" * 20 + "{input}")
    found = attempt(silo, Try((prompt,), ALL[:1], 7, noise=Noise("laplace", 1e-9, 1e12)))
    assert (found.unfit, found.counts.tolist()) == ((False,), [6])
    assert found.sums[0].item() == pytest.approx(attempt(short, Try((prompt,), ALL[:1], 7)).sums[0].item(), abs=1e-4)
    silo = replace(silo, memory={})
    assert attempt(silo, Try((prompt,), ((2, 4),), 7)).unfit == (True,), "without noise at first sight, wherever it begins"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, None),
        ({"sums": torch.tensor([45.0, 1.0], dtype=torch.float64)}, "further from scores"),
        ({"sums": torch.tensor([1.0, -45.0], dtype=torch.float64)}, "further from scores"),
        ({"counts": torch.tensor([0, 4])}, "further from scores"),
        ({"epsilon": 2.5}, "epsilon = 2.5 is not between 0 and 2"),
        ({"epsilon": math.nan}, "epsilon = nan"),
        ({"epsilon": -1.0}, "epsilon = -1"),
        ({"more": (True,)}, "1 flags"),
        ({"least": 0}, "a minimum of 0"),
    ],
)
def test_a_noisy_reply_has_bounds(more: Any, why: str | None) -> None:
    reply = replace(good(), squares=torch.zeros(0, dtype=torch.float64), epsilon=2.0)
    found = replace(reply, **more).problem(Try(POOL[:2], ((0, 4), (2, 6)), 7, noise=Noise("laplace", 1.0, 2.0)))
    assert found is None if why is None else why in str(found)
