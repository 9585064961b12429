"""Workers over real sockets: a straggler costs a round its deadline and no more, and its late reply is nobody's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fedtailor import experiment, wire
from fedtailor.core import Silo, in_silo
from fedtailor.data import SiloData
from fedtailor.engines import courier
from fedtailor.engines.courier import Sockets
from fedtailor.engines.desk import Desk
from fedtailor.engines.remote import Remote
from fedtailor.engines.site import Site
from fedtailor.engines.worker import Open, Opened, Worker
from fedtailor.errors import UserError

wire.allow(__name__)
TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
SILOS = tuple(f"silo_{i}" for i in range(10))
SLOW = ("silo_2", "silo_5", "silo_9")
AWAKE = threading.Event()


@dataclass(frozen=True)
class Ask:
    number: int


@dataclass(frozen=True)
class Told:
    number: int
    silo: str


@in_silo
def sleepy(silo: Silo, body: Ask) -> Told:
    if silo.name in SLOW:
        AWAKE.wait(60)
    return Told(body.number, silo.name)


@pytest.fixture
def ten(tmp_path: Path) -> Iterator[Sockets]:
    """Ten workers, each in a thread, with the run open: nothing of a model is needed here."""
    AWAKE.clear()
    paths = {}
    for name in SILOS:
        worker = Worker(Site(name, tmp_path / name))
        worker.desks["run"] = Desk(name, SiloData((), (), ()), {}, 0)
        up = threading.Event()
        threading.Thread(target=worker.serve, args=(up.set,), daemon=True).start()
        assert up.wait(10)
        paths[name] = worker.address
    yield Sockets(paths)
    AWAKE.set()


def test_three_of_ten_sleep_and_every_round_ends_at_its_deadline(ten: Sockets) -> None:
    asked = experiment.load(TINY)
    engine = Remote(ten, Open("run", 0, asked.data, asked.model), rounds=3, deadline=1.0)
    engine.opened = {name: Opened("0", "0", torch.__version__, 1) for name in SILOS}
    for number in (1, 2, 3):
        began = time.monotonic()
        replies = list(engine.reach(number)(sleepy, Ask(number)))
        assert time.monotonic() - began < 5, "not the sixty seconds that the three sleep"
        assert [reply.silo for reply in replies] == [name for name in SILOS if name not in SLOW]
        assert {reply.body.number for reply in replies} == {number}
        assert [silo for n, silo, _ in engine.rejected if n == number] == list(SLOW)
        engine.commit()
    AWAKE.set()
    replies = list(engine.reach(4)(sleepy, Ask(4), deadline=30))
    assert [(reply.silo, reply.body.number) for reply in replies] == [(name, 4) for name in SILOS], "and no older reply"


@pytest.mark.parametrize("size", [1001, 5_000_000])
def test_a_message_over_a_workers_limit_is_refused_with_the_reason(tmp_path: Path, size: int) -> None:
    """Also where the worker hangs up while it is still being sent."""
    worker, up = Worker(Site("small", tmp_path, body_limit=1000)), threading.Event()
    threading.Thread(target=worker.serve, args=(up.set,), daemon=True).start()
    assert up.wait(10)
    (answer,) = Sockets({"small": worker.address}).exchange(["small"], {"kind": "hello"}, bytes(size), 10)
    assert (answer.lost, answer.head["kind"]) == ("", "refused")
    assert f"a message of 16 + {size} bytes was announced; the limits are 65536 + 1000" in answer.head["why"]


def test_a_path_too_long_for_a_socket_is_told() -> None:
    with pytest.raises(UserError, match=r"too long for a socket's path .103 bytes at most.; choose a folder nearer"):
        courier.address(Path("/x" * 60))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "federation.toml cannot be read"),
        ("engine = ", "federation.toml cannot be read"),
        ('engine = "socket"', r"no such engine; did you mean 'sockets'\? \(choices: flower, nvflare, sockets\)"),
        ('engine = "sockets"', r"\[silos\] is missing; write one line for each silo"),
    ],
)
def test_a_kit_that_is_none(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        courier.of(tmp_path)


def test_a_kit_of_sockets(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('engine = "sockets"\n[silos]\nb = "b/worker.sock"\na = "/run/a.sock"\n')
    with courier.of(tmp_path) as found:
        assert found.silos == ("a", "b")
        assert found == Sockets({"b": tmp_path / "b/worker.sock", "a": Path("/run/a.sock")}, tmp_path / "spool")
