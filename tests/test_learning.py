"""An embedder trained over silos: as one silo would by itself, and nothing of what was asked or answered leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtailor import training, wire
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.engines.desk import seed_of
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, SiloError
from fedtailor.methods.averaging import Averaging, State, Trained
from fedtailor.methods.full import Full
from fedtailor.methods.lora import Lora
from fedtailor.models import Resident
from fedtailor.retrieval import learner, learning
from fedtailor.retrieval.learner import drawn
from fedtailor.retrieval.learning import Contrast, paired, train
from fedtailor.tuned import Tensors
from tiny_embedders import whole

SMALL: dict[str, Any] = {"local_steps": 4, "batch_size": 3}
TRAINERS: dict[str, Averaging] = {"lora": Lora(rank=2, lr=0.02, gap=False, **SMALL), "full": Full(lr=2e-3, **SMALL)}
trainers = pytest.mark.parametrize("kind", TRAINERS)
SAID = {"cafe": ("the tea", "is brewed"), "shop": ("a parcel", "was sent"), "zoo": ("the old bear", "sleeps")}


def rows(name: str, count: int = 5) -> SiloData:
    thing, does = SAID[name]
    said = ((f"What of {thing} {i}?", f"{thing} {i} {does} {i} times", f"{name}-{i}") for i in range(count))
    return SiloData(tuple(Row(*one) for one in said), (), ())


SILOS = {name: rows(name) for name in SAID}


@pytest.fixture(scope="module")
def made(resident_of: Callable[[str], Resident], tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole(resident_of("bert"), tmp_path_factory.mktemp("whole"))


def body(made: str, trainer: Averaging, **more: Any) -> Contrast:
    one = learner.learner(made, trainer)
    return Contrast(trainer, one.initial(7), trainer.lrs(1, 2), embedder=made, sha256=one.base.sha256, **more)


def rounds(
    made: str, trainer: Averaging, silos: dict[str, SiloData], count: int = 2, **more: Any
) -> tuple[list[State], InProcess]:
    engine = InProcess(silos, {}, rounds=count, **more)
    states = [learning.begin(trainer, made, engine.reach(0))]
    for number in range(1, count + 1):
        states.append(learning.round(trainer, made, states[-1], engine.reach(number)))
        engine.commit()
    return states, engine


@trainers
def test_the_loss_falls(made: str, kind: str) -> None:
    states, engine = rounds(made, TRAINERS[kind], SILOS, 6)
    one = learner.learner(made, TRAINERS[kind])
    batch = one.batch([pair for silo in SILOS.values() for pair in paired(silo.train)])
    before, after = (one.reader().losses(state.tensors, batch)[0].item() / 15 for state in (states[0], states[-1]))
    assert after < 0.9 * before
    assert not engine.rejected
    assert not any(name.startswith("head.") for name in states[-1].tensors)


@trainers
def test_one_silo_is_trained_as_by_itself(made: str, kind: str) -> None:
    """Its optimizer kept, two rounds of averaging are the same steps in one place, from the same batches."""
    trainer = replace(TRAINERS[kind], optimizer_state="keep", schedule="constant")
    states, _ = rounds(made, trainer, {"zoo": SILOS["zoo"]})
    one, pairs = learner.learner(made, trainer), paired(SILOS["zoo"].train)
    how = trainer.local((trainer.lr,) * 4)
    steps = [step for number in (1, 2) for step in drawn(5, how, seed_of(0, "zoo", number, 0))]
    batches = [[one.batch([pairs[i] for i in some]) for some in step] for step in steps]
    whole = trainer.local((trainer.lr,) * 8)
    some: Any = [(SILOS["zoo"], 0)]
    done = training.train(one.resident, one.reader(), states[0].tensors, some, whole, [{}], drawn=[batches])
    for name, tensor in states[-1].tensors.items():
        assert torch.allclose(done.tensors[name][0], tensor, atol=1e-5), name
        unused = name.startswith("pooler.")  # the vector is made of the states themselves
        assert torch.equal(tensor, states[0].tensors[name]) == unused, name


@trainers
def test_the_mean_of_what_silos_learnt_by_rows(made: str, kind: str) -> None:
    trainer = TRAINERS[kind]
    states, _ = rounds(made, trainer, SILOS, 1)
    asked = replace(body(made, trainer), tensors=states[0].tensors, lrs=trainer.lrs(1, 1), number=1)
    replies = [train(Silo(n, d, {}, seed_of(0, n, 1, 0)), asked) for n, d in SILOS.items()]
    assert [reply.weight for reply in replies] == [12, 12, 12]
    for name, tensor in states[1].tensors.items():
        mean = torch.stack([reply.delta[name] for reply in replies]).mean(0)
        assert torch.allclose(states[0].tensors[name] + mean, tensor, atol=1e-6), name
    assert states[1].notes["train_loss"] == pytest.approx(sum(reply.loss for reply in replies) / 3)


@pytest.mark.parametrize(
    "trainer",
    [
        Lora(rank=2, aggregate="median", gap=False, **SMALL), Lora(rank=2, combine="exact", **SMALL),
        Lora(rank=2, scaffold=True, **SMALL), Lora(rank=2, dropout=0.2, **SMALL), Full(server_optimizer="adam", **SMALL),
    ],
)  # fmt: skip
def test_whatever_the_trainer_does_with_changes(made: str, trainer: Averaging) -> None:
    """Twice the same, and it can be embedded with."""
    (*_, last), engine = rounds(made, trainer, SILOS)
    (*_, again), _ = rounds(made, trainer, SILOS)
    assert not engine.rejected
    assert last.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(t, again.tensors[n]) for n, t in last.tensors.items())
    found = learner.learner(made, trainer).embedder(trainer.serve(last).tensors).questions(["What of the tea?"])
    assert found.shape == (1, 16)


@trainers
def test_no_text_crosses(made: str, kind: str) -> None:
    crossed: list[tuple[str, str, bytes]] = []
    rounds(made, TRAINERS[kind], SILOS, record=lambda silo, way, data: crossed.append((silo, way, bytes(data))))  # type: ignore[arg-type]
    assert {way for _, way, _ in crossed} == {"up", "down"}
    for silo, way, data in crossed:
        for said in SAID[silo]:
            assert said.encode() not in data
        if way == "up":
            reply = wire.unpack(data)
            assert isinstance(reply, Trained)
            like = learning.example(TRAINERS[kind], made)
            assert wire.leaving(reply) == wire.leaving(like)
            assert (reply.weight, math.isfinite(reply.loss)) == (like.weight, True)


def test_a_silo_with_too_little_to_learn_from_is_left_out(made: str) -> None:
    """Rows without a question or an answer count as none."""
    few = SiloData((Row("What?", "That"), Row("", "x", messages=({"role": "user", "content": "Hi"},)), Row("Who?", " ")), (), ())
    _, engine = rounds(made, TRAINERS["lora"], {**SILOS, "zoo": few}, 1)
    assert [(silo, why.partition(":")[0]) for _, silo, why in engine.rejected] == [
        ("zoo", "1 training rows with a question and an answer")
    ]
    with pytest.raises(RunError, match="no reply of 1 silos could be used"):
        rounds(made, TRAINERS["lora"], {"zoo": few}, 1)


def test_a_template_is_not_part_of_a_question() -> None:
    row = Row("Question: Why?\nAnswer:", " So. ", frame=(10, 8))
    assert paired([row]) == [("Why?", "So.")]


def test_what_a_silo_cannot_do(made: str) -> None:
    silo, one = Silo("zoo", SILOS["zoo"], {}, 5), body(made, TRAINERS["lora"])
    with pytest.raises(SiloError, match="other weights than the server's"):
        train(silo, replace(one, sha256="0"))
    with pytest.raises(SiloError, match="'nobody/nothing': cannot be loaded"):
        train(silo, replace(one, embedder="nobody/nothing"))
    with pytest.raises(SiloError, match=r"the loss became nan at local step 1: lower method\.trainer\.lr"):
        train(silo, replace(one, tensors={n: t * math.nan for n, t in one.tensors.items()}))


def test_the_temperature_and_the_way_back_are_asked_for(made: str) -> None:
    """A higher temperature makes all passages more alike to a question: of 3 the loss goes to ln 3."""
    silo = Silo("zoo", SILOS["zoo"], {}, 5)
    told: dict[str, Tensors] = {}
    for name, more in {"plain": {}, "hot": {"temperature": 1e4}, "both": {"both": True}}.items():
        reply = train(silo, body(made, TRAINERS["lora"], **more))
        told[name] = reply.delta
        if name == "hot":
            assert reply.loss == pytest.approx(math.log(3), abs=1e-3)
    assert any(not torch.equal(t, told["both"][n]) for n, t in told["plain"].items())


def test_moments_are_kept_where_they_are_to_be(made: str) -> None:
    trainer = TRAINERS["lora"]
    silo = Silo("zoo", SILOS["zoo"], {}, 5)
    train(silo, body(made, trainer))
    assert silo.memory == {}
    kept = replace(trainer, optimizer_state="keep")
    train(silo, body(made, kept))
    assert {name.partition("/")[0] for name in silo.memory["moments"]} == {"m", "v", "step"}
    assert all(isinstance(t, torch.Tensor) for t in silo.memory["moments"].values())
