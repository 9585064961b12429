"""FedBPT on a tiny model: better than its start, without a gradient, in few bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.baselines import pooled
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.methods.blackbox import Blackbox, Evolve, Evolved, Rate, Rated, evolve, evolved, rate, subspace
from fedtailor.methods.soft_prompt import WEIGHT
from fedtailor.models import Resident
from judged import LABELS, judged, sharpened

BUDGET = 8_000  # bytes up, of a silo and round


def settings(**more: Any) -> Blackbox:
    return Blackbox(**{"virtual_tokens": 4, "dimensions": 24, "batch_size": 12, "generations": 3, **more})


@pytest.fixture(params=["llama", "gpt2"])
def sharp(request: pytest.FixtureRequest) -> Resident:
    return sharpened(request.param)


def label_loss(served: Any, base: Resident, data: dict[str, SiloData]) -> float:
    """What is searched for: nats of the right label among the labels, on rows that no silo was asked about."""
    model, rows = served.open({"base": base}), [row for silo in data.values() for row in (*silo.val, *silo.test)]
    true = torch.tensor([[LABELS.index(row.answer)] for row in rows])
    return -float(model.scores(rows, LABELS).log_softmax(1).gather(1, true).mean())


@pytest.mark.parametrize("share", ["means", "losses"])
def test_it_improves_without_a_gradient(sharp: Resident, share: Any) -> None:
    """In inference mode no graph is made at all: nothing could be differentiated."""
    data, method, rounds = judged(), settings(share=share, sigma=1.0, sigma_end=0.5), 3
    with torch.inference_mode():
        engine = InProcess(data, {"base": sharp}, rounds=rounds)
        state = method.begin(engine.reach(0))
        before = label_loss(method.serve(state), sharp, data)
        engine.traffic.take()
        for number in range(1, rounds + 1):
            state = method.round(state, engine.reach(number))
            up, _ = engine.traffic.take()
            assert up / len(data) < BUDGET
        after = label_loss(method.serve(state), sharp, data)
    assert after < before - 0.02
    assert state.notes["model_calls"] == pytest.approx(3 * state.notes["calls"])
    assert not any(p.requires_grad for p in sharp.module.parameters())


def test_the_default_sends_a_few_hundred_numbers_in_under_8_kb(llama: Resident) -> None:
    for dimensions in (200, 500):
        body = Blackbox(dimensions=dimensions).example(llama, 3)
        assert sum(t.numel() for t in wire.tensors_of(body).values()) == dimensions
        assert len(wire.pack(body)) < BUDGET


def test_cma_es_finds_a_minimum() -> None:
    """A sphere of 5 dimensions: the mean ends near it. The candidates come with the mean last."""
    goal = torch.tensor([0.5, -0.3, 0.0, 0.8, -0.6])

    def rated(candidates: torch.Tensor) -> torch.Tensor:
        assert candidates.shape == (9, 5)
        return (candidates - goal).square().sum(1)

    z = evolved(torch.zeros(5), 0.3, 60, 8, 1, rated)
    assert (z - goal).norm() < 0.01
    assert torch.equal(z, evolved(torch.zeros(5), 0.3, 60, 8, 1, rated))


def test_the_subspace_is_the_same_everywhere() -> None:
    one = subspace(5, 64, 8)
    subspace.cache_clear()
    assert torch.equal(subspace(5, 64, 8), one)
    assert not torch.equal(subspace(6, 64, 8), one)


def test_z_is_where_the_prompt_is(llama: Resident) -> None:
    """prompt(z) = e0 + spread * A z, e0 the embeddings of the text."""
    method = settings()
    start = method.prompt(llama, 3)(torch.zeros(24))[WEIGHT]
    ids = llama.tokenizer(method.init_text, add_special_tokens=False).input_ids[:4]
    assert torch.equal(start, llama.module.get_input_embeddings().weight[torch.tensor(ids)].float())
    z = torch.randn(24, generator=torch.Generator().manual_seed(0))
    moved = method.prompt(llama, 3)(z)[WEIGHT] - start
    by_hand = start.std() / math.sqrt(24) * (subspace(3, start.numel(), 24) @ z).view(start.shape)
    assert torch.allclose(moved, by_hand, atol=1e-6)


def test_losses_over_silos_are_those_of_one_place(llama: Resident) -> None:
    """All rows rated by all: the mean of the silos' losses is the pooled one, so the server's search is the same."""
    data = judged(rows=12)
    method, z = settings(batch_size=12), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    silos = [Silo(name, rows, {"base": llama}, 1) for name, rows in data.items()]
    apart = [rate(silo, Rate(method, z, 3)) for silo in silos]
    (name, rows), = pooled(data).items()
    together = rate(Silo(name, rows, {"base": llama}, 1), Rate(method.pooled(3), z, 3))
    assert torch.allclose(torch.stack([one.losses for one in apart]).mean(0), together.losses, atol=1e-5)
    assert sum(one.calls for one in apart) == together.calls == 5 * 36


def test_what_is_exported_loads_in_plain_peft(
    llama: Resident, plain: Callable[[str], Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    method = settings()
    state = method.begin(InProcess(judged(rows=6), {"base": llama}).reach(0))
    served = method.serve(replace(state, tensors={"z": torch.ones(24)}))
    method.export(llama, served.on(llama), tmp_path)
    loaded = PeftModel.from_pretrained(plain("llama"), tmp_path)
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad():
        theirs = loaded(ids).logits[:, -1]
        tuned = method.put_on(llama, 0)
        ours = tuned.using(served.on(llama), ids, torch.ones_like(ids), torch.arange(3)[None], 1)[0][:, -1]
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_sigma_falls_from_the_first_round_to_the_last() -> None:
    method = settings(sigma=0.8, sigma_end=0.2)
    assert [round(method.sigma_of(n, 3), 6) for n in (1, 2, 3)] == [0.8, 0.4, 0.2]
    assert method.sigma_of(1, 1) == 0.8
    assert settings(sigma=0.05).sigma_of(3, 3) == 0.05


def test_calls_are_counted(llama: Resident) -> None:
    """3 generations of 13 candidates and the start once, over 12 rows."""
    method = settings()
    assert method.size == 4 + int(3 * math.log(24))
    (silo,) = [Silo(name, rows, {"base": llama}, 1) for name, rows in judged(silos=1).items()]
    asked = Evolve(method, torch.zeros(24), 0.3, 3)
    found = evolve(silo, asked)
    assert found.calls == (3 * method.size + 1) * 12 == method.most_calls
    assert found.problem(asked) is None


ASKED = Evolve(settings(), torch.zeros(24), 0.3, 3)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Evolved(torch.zeros(23), 1.0, 10.0), "asked float32 (24,)"),
        (Evolved(torch.zeros(24).double(), 1.0, 10.0), "float64"),
        (Evolved(torch.full((24,), math.inf), 1.0, 10.0), "not finite"),
        (Evolved(torch.zeros(24), math.nan, 10.0), "out of bounds"),
        (Evolved(torch.zeros(24), 1.0, 1e9), "out of bounds"),
        (Evolved(torch.zeros(24), 1.0, 10.0, 5.0), "out of bounds"),
    ],
)
def test_a_move_checks_itself(reply: Evolved, why: str) -> None:
    assert why in str(reply.problem(ASKED))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Rated(torch.zeros(4), 10.0), "asked 5"),
        (Rated(torch.full((5,), math.nan), 10.0), "not finite"),
        (Rated(torch.zeros(5), 0.0), "out of bounds"),
        (Rated(torch.zeros(5), 10.0, 2.0), "out of bounds"),
    ],
)
def test_losses_check_themselves(reply: Rated, why: str) -> None:
    assert why in str(reply.problem(Rate(settings(), torch.zeros(5, 24), 3)))
    assert Rated(torch.zeros(5), 10.0).problem(Rate(settings(), torch.zeros(5, 24), 3)) is None


def test_a_text_to_begin_at_is_needed() -> None:
    with pytest.raises(ValueError, match="init_text is empty"):
        Blackbox(init_text="")
