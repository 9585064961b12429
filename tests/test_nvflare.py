"""A real federation on 127.0.0.1: the engine's server, three silos with their workers, mutual TLS. In order of the file."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from background import wait_for
from commands import Command
from fedtailor import data as rows
from fedtailor import experiment, find, models, packed, wire
from fedtailor.engines import doctor, frames, nvflare_kit
from fedtailor.engines.courier import Answer
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.nvflare import NVFlare
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.errors import UserError
from flares import SILOS, Federation, all_answer, hello, listening, worker_at
from libraries import asked_there_and_here, same_answer
from tiny_runs import PUBLIC, kept

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

import psutil  # noqa: E402  (comes with NVFlare)

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"

METHODS = [  # tiny is a causal model; those that ask documents have nothing to compare after a round
    name for name, kind in find.methods().items() if "causal" in getattr(kind, "FOR", ("causal",)) and not hasattr(kind, "judge")
]


@dataclass
class Case:
    """The shipped tiny experiment, and what it gives in one process."""

    spec: Any
    state: bytes
    runs: int = 0

    def over(self, flare: Any) -> tuple[bytes, Remote]:
        self.runs += 1
        run = f"{type(self.spec.method).__name__}-{self.spec.rounds}-{self.runs}"
        opening = Open(run, 0, self.spec.data, self.spec.model, self.spec.silo, 1)
        mine: Any = {"public": PUBLIC, "models": {"base": models.load(self.spec.model)}}
        remote = Remote(flare, opening, rounds=self.spec.rounds, deadline=120.0, **mine)
        return wire.pack(experiment.run(self.spec, remote).state), remote


def case(*sets: str) -> Case:
    torch.set_num_threads(1)  # a module's fixture comes before what sets it for each test
    spec = experiment.load(TINY, [*kept(sets), *sets])
    silos = rows.load(spec.data, spec.silo, 0).silos
    assert tuple(sorted(silos)) == SILOS
    local = InProcess(silos, {"base": models.load(spec.model)}, rounds=spec.rounds, run="local", public=PUBLIC)
    return Case(spec, wire.pack(experiment.run(spec, local).state))


@pytest.fixture(scope="module")
def tiny() -> Case:
    return case("rounds=3")


@dataclass
class Disturbed:
    """A courier during whose fourth exchange something happens."""

    flare: NVFlare
    strike: Callable[[], None]
    count: int = 0

    @property
    def silos(self) -> tuple[str, ...]:
        return self.flare.silos

    def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
        self.count += 1
        if self.count == 4:
            self.strike()
        return self.flare.exchange(to, head, body, timeout)


def test_the_same_tensors_as_in_one_process(flare: NVFlare, tiny: Case) -> None:
    state, remote = tiny.over(flare)
    assert state == tiny.state
    assert remote.rejected == []
    state, remote = tiny.over(flare)
    assert state == tiny.state
    assert {silo: one.loads for silo, one in remote.opened.items()} == dict.fromkeys(SILOS, 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tensors_whatever_the_method(flare: NVFlare, method: str) -> None:
    one = case(f"method.name={method}", "rounds=2")
    state, remote = one.over(flare)
    assert state == one.state
    assert remote.rejected == []


def test_the_same_answer_from_the_same_passages(flare: NVFlare, embedder: str, tmp_path: Path) -> None:
    same_answer(*asked_there_and_here(flare, tmp_path, embedder, deadline=120.0))


def test_who_is_connected_is_told_and_a_kit_that_works_has_nothing_to_mend(
    flare: NVFlare, federation: Federation, fedtailor: Command
) -> None:
    ended = fedtailor("status", federation.kits["server"])
    assert ended.code == 0
    assert re.findall(r"(\w+): last seen \d+ s ago", ended.out) == list(SILOS)
    for kit in ("server", "cafe"):
        assert [one for one in doctor.findings(federation.kits[kit]) if one.fine is False] == []


def test_a_trivial_exchange_tells_its_time(flare: NVFlare, capsys: pytest.CaptureFixture[str]) -> None:
    hello(flare)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        assert [answer for answer in hello(flare) if answer.lost] == []
        took.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"\ntrivial exchange, 3 silos over mutual TLS, median of 20: {1000 * statistics.median(took):.0f} ms")


@pytest.fixture
def echo(federation: Federation) -> Iterator[None]:
    """A worker of cafe's that sends back what it gets."""

    def talk(link: socket.socket) -> None:
        with link, contextlib.suppress(frames.FrameError):
            while True:
                head, body = frames.receive(link)
                frames.send(link, {"silo": "cafe"} if head == {"kind": "hello"} else head, body)

    kit = federation.kits["cafe"]
    with listening(kit / "echo.sock", talk), worker_at(kit, "echo.sock"):
        yield


@pytest.mark.parametrize("size", [0, 1, 16 * 1024**2, 16 * 1024**2 + 1, 40_000_000])
def test_bodies_of_any_size_come_back_whole(size: int, flare: NVFlare, echo: None) -> None:
    body = os.urandom(size)
    (answer,) = flare.exchange(["cafe"], {"kind": "echo", "braces": "{}", "sign": "ü"}, body, 60)
    assert answer.lost == ""
    assert answer.head == {"kind": "echo", "braces": "{}", "sign": "ü"}
    assert (len(answer.body), packed.digest(answer.body)) == (size, packed.digest(body))


def test_a_silo_that_is_late_holds_up_no_other(flare: NVFlare, federation: Federation) -> None:
    worker = psutil.Process(federation.running["worker:cafe"].pid)
    worker.suspend()
    try:
        began = time.monotonic()
        stream = flare.exchange(SILOS, {"kind": "hello"}, b"", 3.0)
        came = {answer.silo: (answer.lost, time.monotonic() - began) for answer in stream}
    finally:
        worker.resume()
    assert came["cafe"][0] == "no reply within 3 s"
    assert 2.9 < came["cafe"][1] < 5
    for silo in ("clinic", "shop"):
        assert came[silo][0] == ""
        assert came[silo][1] < 2
    assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def test_one_program_at_a_time(flare: NVFlare, federation: Federation) -> None:
    with pytest.raises(UserError, match="another program runs"):
        NVFlare(federation.kits["server"])
    assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def test_a_killed_client_job_loses_nothing(flare: NVFlare, federation: Federation, tiny: Case) -> None:
    state, _ = tiny.over(Disturbed(flare, lambda: federation.kill("cafe", "worker_process")))
    assert state == tiny.state


def test_exchanges_shorter_than_a_jobs_start_find_it_all_the_same(flare: NVFlare, federation: Federation) -> None:
    federation.kill("shop", "worker_process")
    time.sleep(3)  # NVFlare needs 2 to fail the whole job
    assert wait_for(lambda: not [a for a in hello(flare, 1.0) if a.lost], 30)


def test_a_killed_server_loses_nothing(flare: NVFlare, federation: Federation, tiny: Case) -> None:
    state, remote = tiny.over(Disturbed(flare, lambda: federation.kill("server", "server_train")))
    assert state == tiny.state
    assert {silo: one.loads for silo, one in remote.opened.items()} == dict.fromkeys(SILOS, 1)


def test_a_killed_keeper_of_the_server_leaves_nothing_in_the_way(flare: NVFlare, federation: Federation) -> None:
    """The engine outlives it and holds the port: the next one ends it first."""
    federation.running.pop("server").kill()
    old = federation.processes("server", "server_train")
    assert old
    federation.start("server")
    assert psutil.wait_procs(old, 30)[1] == []
    assert all_answer(flare)


def test_a_silos_processes_are_kept_and_none_is_left_alone(federation: Federation, tmp_path: Path) -> None:
    """`fedtailor silo KIT` of a kit whose server is not there."""
    folder = tmp_path / "fed"
    federation.kits["alone"] = kit = nvflare_kit.init(folder, "demo", "localhost:9", ["alone"])["alone"]
    command = [sys.executable, "-c", "from fedtailor.cli import main; main()", "silo", str(kit)]

    def started() -> subprocess.Popen[bytes]:
        with (tmp_path / "silo.log").open("a") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def runs(what: str, no: Sequence[Any] = ()) -> list[Any]:
        found: list[Any] = []
        assert wait_for(lambda: found.extend(p for p in federation.processes("alone", what) if p not in no) or found, 60), what
        return found

    silo = started()
    try:
        (courier,), (engine,) = runs("courier"), runs("client_train")
        courier.kill()  # another one takes its place, and ends the engine that it kept
        (courier,), (engine,) = runs("courier", [courier]), runs("client_train", [engine])
        silo.kill()
        silo.wait()
        silo = started()
        (other,) = runs("courier", [courier])  # it waits
        assert engine.is_running()
        courier.kill()
        runs("client_train", [engine])
        assert other.is_running()
    finally:
        silo.send_signal(signal.SIGTERM)
        silo.wait(60)
    assert federation.processes("alone", "courier") + federation.processes("alone", "client_train") == []
    del federation.kits["alone"]
