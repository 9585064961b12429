"""The engine over workers: whatever is lost, repeated or restarted on the way, the tensors at the end are the same."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from couriers import SILOS, Straight
from fedtailor import data, experiment, models, wire
from fedtailor.baselines import Bare
from fedtailor.engines import remote
from fedtailor.engines.courier import Answer
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.reach import _problem
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open, Opened
from fedtailor.errors import RunError
from fedtailor.evaluate import Evaluate, evaluate
from fedtailor.experiment import Experiment
from fedtailor.generations import Generations

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def asked(*sets: str) -> Experiment:
    return experiment.load(TINY, ["rounds=3", "method.optimizer_state=keep", "engine.cohort=1", *sets])


def engine(courier: Any, of: Experiment, run: str = "run", **more: Any) -> Remote:
    return Remote(courier, Open(run, 0, of.data, of.model, of.silo, 1), rounds=of.rounds, **more)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[bytes, list[Any]]:
    torch.set_num_threads(1)  # before any test has: bit-equal runs are asked for with one
    one = asked()
    local = InProcess(data.load(one.data, one.silo, 0).silos, {"base": models.load(one.model)}, rounds=one.rounds)
    report = experiment.run(one, local)
    return wire.pack(report.state), [(e["bytes_up"], e["bytes_down"], e["val"]) for e in report.log]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", (0.0, 0.0))


def test_the_same_as_in_one_process(tmp_path: Path, undisturbed: tuple[bytes, list[Any]]) -> None:
    report = experiment.run(asked(), engine(Straight(tmp_path), asked()))
    assert wire.pack(report.state) == undisturbed[0]
    assert [(e["bytes_up"], e["bytes_down"], e["val"]) for e in report.log] == undisturbed[1]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_losses_and_restarts_change_nothing(tmp_path: Path, undisturbed: tuple[bytes, list[Any]], seed: int) -> None:
    dice = random.Random(seed)
    fates = ["fine", "never arrives", "reply lost", "twice", "dies", "dies after"]
    courier = Straight(tmp_path, lambda silo: dice.choice(fates))
    one = engine(courier, asked())
    report = experiment.run(asked(), one)
    assert wire.pack(report.state) == undisturbed[0]
    assert one.rejected == []
    assert len(courier.sent) > 3 * (2 * 3 + 3), "messages were sent again"


@pytest.mark.parametrize("at", [5, 9, 13])
def test_a_server_that_was_killed_goes_on(tmp_path: Path, undisturbed: tuple[bytes, list[Any]], at: int) -> None:
    class Killed(BaseException):
        pass

    def fate(silo: str) -> str:
        if len(courier.sent) == at:
            raise Killed
        return "fine"

    courier = Straight(tmp_path / "silos", fate)
    with pytest.raises(Killed):
        experiment.run(asked(), engine(courier, asked()), Generations(tmp_path / "server"))
    rest = Straight(tmp_path / "silos")
    report = experiment.run(asked(), engine(rest, asked()), Generations(tmp_path / "server"))
    assert wire.pack(report.state) == undisturbed[0]


def test_a_silo_that_stays_away_is_named(tmp_path: Path) -> None:
    one = engine(Straight(tmp_path, lambda silo: "never arrives" if silo == "shop" else "fine"), asked(), deadline=0.3)
    state = asked().method.begin(one.reach(0))
    one.commit()
    asked().method.round(state, one.reach(1))
    assert one.rejected == [(1, "shop", "lost on the way there")]
    with pytest.raises(RunError, match=r"round 2: 2 replies that could be used, fewer than engine\.minimum = 3; shop: lost"):
        asked().method.round(state, replace_engine(one, minimum=3).reach(2))


def replace_engine(one: Remote, **more: Any) -> Remote:
    return Remote(one.courier, one.opening, rounds=one.rounds, **{"deadline": one.deadline, **more})


def test_a_minimum_counts_what_can_be_used(tmp_path: Path) -> None:
    class Spoilt(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            for answer in super().exchange(to, head, body, timeout):
                spoilt = answer.silo == "shop" and head.get("round") == 1
                yield replace(answer, body=wire.pack(wire.Failure("no rows today"))) if spoilt else answer

    one = engine(Spoilt(tmp_path), asked(), minimum=3)
    state = asked().method.begin(one.reach(0))
    one.commit()
    with pytest.raises(RunError, match=r"round 1: 2 replies that could be used, .* = 3; shop: no rows today"):
        asked().method.round(state, one.reach(1))


def test_a_silo_that_is_slow_to_open_holds_up_no_other(tmp_path: Path) -> None:
    class Slow(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            slow = [silo for silo in to if silo == "shop" and head["kind"] == "open" and one.rejected == []]
            yield from super().exchange([silo for silo in to if silo not in slow], head, body, timeout)
            if slow:  # its worker came back, and takes longer to load its base than the round has
                time.sleep(timeout)
                yield Answer("shop", lost=f"no reply within {timeout:.3g} s")

    one = engine(Slow(tmp_path), asked(), deadline=1.5)
    for silo in ("cafe", "clinic"):
        one._open([silo], 60, {})
    state = asked().method.begin(one.reach(0))
    one.commit()
    assert [reply.silo for reply in one.reach(1)(train(), body(state))] == ["cafe", "clinic"]
    assert [(number, silo) for number, silo, _ in one.rejected] == [(1, "shop")]
    one.commit()
    assert [reply.silo for reply in one.reach(2)(train(), body(state), deadline=60)] == list(SILOS)


def test_a_silo_that_may_not_take_part_is_not_told_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            refusing = [silo for silo in to if silo == "shop" and head["kind"] == "open" and mended == []]
            yield from (Answer(silo, {"kind": "refused", "why": "its own log says why"}) for silo in refusing)
            self.sent.extend((silo, "refused") for silo in refusing)
            yield from super().exchange([silo for silo in to if silo not in refusing], head, body, timeout)

    mended: list[bool] = []
    courier = Changed(tmp_path)
    one = engine(courier, asked())
    state = asked().method.begin(one.reach(0))
    for number in (1, 2, 3):
        assert len(list(one.reach(number)(train(), body(state)))) == 2
        one.commit()
    assert courier.sent.count(("shop", "refused")) == 1
    assert [why for _, _, why in one.rejected] == ["its own log says why"] * 3, "it is named in each round all the same"
    mended.append(True)
    later = time.monotonic() + remote.REFUSED[0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: later)
    assert len(list(one.reach(4)(train(), body(state)))) == 3


def test_a_deadline_holds_for_the_whole_exchange(tmp_path: Path) -> None:
    class Slow(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            fast = [silo for silo in to if silo != "shop" or head["kind"] == "open"]
            yield from super().exchange(fast, head, body, timeout)
            if len(fast) < len(to):
                time.sleep(timeout)
                yield Answer("shop", lost=f"no reply within {timeout:.3g} s")

    one = engine(Slow(tmp_path), asked())
    for silo in SILOS:  # the bases are loaded: what is timed is the wait alone
        one._open([silo], 60, {})
    state = asked().method.begin(one.reach(0))
    one.commit()
    began = time.monotonic()
    list(one.reach(1)(train(), body(state), deadline=1.0))
    assert 0.9 < time.monotonic() - began < 3
    assert [(number, silo) for number, silo, _ in one.rejected] == [(1, "shop")]


def train() -> Any:
    from fedtailor.methods.averaging import train

    return train


def body(state: Any) -> Any:
    from fedtailor.methods.averaging import Train

    return Train(asked().method, state.tensors, (0.01,))


def test_another_base_is_refused_before_training(tmp_path: Path) -> None:
    one = engine(Straight(tmp_path), asked(), model_sha256="0" * 64)
    with pytest.raises(RunError, match=r"cafe: its base model is another one .sha256 a4837dab0bd8, asked 0{12}."):
        asked().method.begin(one.reach(0))


def test_a_reply_to_another_request_is_not_used(tmp_path: Path) -> None:
    class Confused(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            for answer in super().exchange(to, head, body, timeout):
                yield replace(answer, head={**answer.head, "id": "0" * 64}) if answer.silo == "shop" else answer

    one = engine(Confused(tmp_path), asked(), deadline=0.3)
    state = asked().method.begin(one.reach(0))
    asked().method.round(state, one.reach(1))
    assert one.rejected == [(1, "shop", "answered 'reply' to another request than this")]


def test_a_reply_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Garbled(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            for answer in super().exchange(to, head, body, timeout):
                spoilt = answer.silo == "shop" and answer.head["kind"] == "reply"
                yield replace(answer, body=answer.body[:-3]) if spoilt else answer

    one = engine(Garbled(tmp_path), asked())
    asked().method.round(asked().method.begin(one.reach(0)), one.reach(1))
    ((number, silo, why),) = one.rejected
    assert (number, silo) == (1, "shop")
    assert why.startswith("its reply cannot be read: ")


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"half a mess", "what it opened with cannot be read: "), (wire.pack(asked().method), "it opened with a Prefix")],
)
def test_a_silo_that_opens_with_something_else_is_refused(tmp_path: Path, body: bytes, said: str) -> None:
    class Garbled(Straight):
        def exchange(self, to: Sequence[str], head: Any, given: bytes, timeout: float) -> Iterator[Answer]:
            for answer in super().exchange(to, head, given, timeout):
                yield replace(answer, body=body) if answer.silo == "cafe" and head["kind"] == "open" else answer

    one = engine(Garbled(tmp_path), asked())
    asked().method.begin(one.reach(0))
    ((number, silo, why),) = one.rejected
    assert (number, silo) == (0, "cafe")
    assert why.startswith(said)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    one = engine(Straight(tmp_path), asked(), tokenizer_sha256="0" * 64)
    with pytest.raises(RunError, match=r"cafe: its tokenizer is another one .sha256 [0-9a-f]{12}, asked 0{12}."):
        asked().method.begin(one.reach(0))


def test_a_reply_of_another_class_is_rejected_by_name(tmp_path: Path) -> None:
    class Other(Straight):
        def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
            for answer in super().exchange(to, head, body, timeout):
                wrong = answer.silo == "shop" and head.get("round") == 1
                yield replace(answer, body=wire.pack(one.opening)) if wrong else answer

    one = engine(Other(tmp_path), asked())
    asked().method.round(asked().method.begin(one.reach(0)), one.reach(1))
    assert one.rejected == [(1, "shop", "a body of class Open was not asked for")]


def test_a_reply_whose_own_check_trips_is_one_silos_fault() -> None:
    @dataclass(frozen=True)
    class Odd:
        number: object

        def problem(self, asked: object) -> str | None:
            return None if self.number > 0 else "too small"  # type: ignore[operator]

    assert _problem(Odd(1), None, Odd) is None
    assert _problem(Odd(0), None, Odd) == "too small"
    assert str(_problem(Odd("x"), None, Odd)).startswith("cannot be checked (TypeError: ")


def test_a_lost_silo_is_waited_for_less_and_less_until_it_answers(tmp_path: Path) -> None:
    away = {"shop"}
    one = engine(Straight(tmp_path, lambda silo: "never arrives" if silo in away else "fine"), asked(), patience=0.8)
    for silo in SILOS:
        one._open([silo], 60, {})
    state = asked().method.begin(one.reach(0))
    one.commit()
    took = []
    for number in (1, 2, 3):
        began = time.monotonic()
        list(one.reach(number)(train(), body(state)))
        took.append(time.monotonic() - began)
        one.commit()
    assert [silo for _, silo, _ in one.rejected] == ["shop"] * 3
    assert took[0] > 0.8
    assert one.missed == {"shop": 3}
    away.clear()
    assert [reply.silo for reply in one.reach(4)(train(), body(state))] == list(SILOS)
    assert one.missed == {}


def test_while_no_silo_at_all_answers_the_deadline_holds(tmp_path: Path) -> None:
    began = time.monotonic()
    gone = iter([True] * 300)
    one = engine(Straight(tmp_path, lambda silo: "never arrives" if next(gone, False) else "fine"), asked(), patience=0.0)
    assert len(list(one.reach(1)(evaluate, Evaluate(Bare(labels=2), "val", 4)))) > 0
    assert one.rejected == []
    assert time.monotonic() - began < 60


def test_a_base_is_loaded_once_however_many_rounds(tmp_path: Path) -> None:
    one = engine(Straight(tmp_path), asked())
    before = models.loads()
    experiment.run(asked(), one)
    assert models.loads() - before <= 1
    assert all(isinstance(found, Opened) for found in one.opened.values())
