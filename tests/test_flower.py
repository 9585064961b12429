"""A real federation over Flower on 127.0.0.1: its server, three silos, TLS, a key for each node. In order of the file.

An exchange takes Flower 3 s and more, so there are few.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch

import background
from background import Kits, free_port, killed, trusting
from commands import PROCESS, Command
from fedtailor import data as rows
from fedtailor import experiment, find, models, wire
from fedtailor.engines import doctor, flower_kit, frames
from fedtailor.engines import kit as kits
from fedtailor.engines.courier import Answer
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.errors import UserError

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedtailor[flower]'")
pytestmark = pytest.mark.engines

from fedtailor.engines.flower import COMMANDS, Flower, _flwr, serve_server  # noqa: E402
from libraries import asked_there_and_here, same_answer  # noqa: E402
from tiny_runs import PUBLIC  # noqa: E402

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
SILOS = ("cafe", "clinic", "shop")


class Federation(Kits):
    def start(self, who: str) -> None:
        with (self.kits[who] / "test.log").open("a") as log:
            command = [*PROCESS, "server" if who == "server" else "silo", str(self.kits[who])]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.running[who] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def processes(self, who: str, *names: str) -> list[psutil.Process]:
        """The engine's own, by the command they run."""
        return self.of(who, lambda line: any(name in line for name in names or COMMANDS))

    def kill(self, who: str, name: str) -> None:
        killed(self.processes(who, name))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("f")
    made = Federation(flower_kit.init(folder / "fed", "demo", f"localhost:{free_port()}", SILOS, 3))
    for silo in SILOS:
        trusting(made.kits[silo])
    try:
        made.start("server")
        log = made.kits["server"] / "test.log"
        assert wait_for(lambda: log.read_text().count("is registered") == len(SILOS), 120), log.read_text()
        for silo in SILOS:
            made.start(silo)
        yield made
    finally:
        made.stop()
        left = [process for who in made.kits for process in made.processes(who)]
        for process in left:
            process.kill()
    assert left == [], "the engine's processes outlived it"


@pytest.fixture(scope="module")
def flower(federation: Federation) -> Iterator[Flower]:
    with Flower(federation.kits["server"]) as one:
        assert wait_for(lambda: not [a for a in hello(one) if a.lost], 120), "the federation did not come up"
        yield one


def hello(flower: Flower, timeout: float = 60.0) -> list[Answer]:
    return list(flower.exchange(SILOS, {"kind": "hello"}, b"", timeout))


wait_for = partial(background.wait_for, pause=1.0)  # each look may be a message to every silo


def asked(method: str, *sets: str) -> experiment.Experiment:
    torch.set_num_threads(1)
    return experiment.load(TINY, [f"method.name={method}", *sets, "rounds=1", "evaluate.every=9"])


def here(spec: experiment.Experiment) -> bytes:
    silos = rows.load(spec.data, spec.silo, 0).silos
    assert tuple(sorted(silos)) == SILOS
    return wire.pack(experiment.run(spec, InProcess(silos, {"base": models.load(spec.model)}, rounds=spec.rounds)).state)


def over(courier: Any, spec: experiment.Experiment, run: str) -> tuple[bytes, Remote]:
    remote = Remote(courier, Open(run, 0, spec.data, spec.model, spec.silo, 1), rounds=spec.rounds, deadline=300.0)
    return wire.pack(experiment.run(spec, remote).state), remote


def test_the_same_tensors_as_in_one_process(flower: Flower) -> None:
    spec = asked("prefix", "method.optimizer_state=keep")
    state, remote = over(flower, spec, "whole")
    assert state == here(spec)
    assert remote.rejected == []
    assert {silo: one.loads for silo, one in remote.opened.items()} == dict.fromkeys(SILOS, 1), "base models loaded"


def test_the_same_tensors_whatever_the_method(flower: Flower) -> None:
    """One round of each method, all in one run: Flower takes seconds for each exchange."""
    kinds = {name: kind for name, kind in find.methods().items() if not hasattr(kind, "judge")}  # these ask, and do not train
    methods = [name for name, kind in kinds.items() if "causal" in getattr(kind, "FOR", ("causal",))]
    spec = asked("prefix")
    silos, base = rows.load(spec.data, spec.silo, 0).silos, models.load(spec.model)
    local = InProcess(silos, {"base": base}, rounds=len(methods), public=PUBLIC)
    opening, mine = Open("methods", 0, spec.data, spec.model, spec.silo, 1), {"public": PUBLIC, "models": {"base": base}}
    remote = Remote(flower, opening, rounds=len(methods), deadline=300.0, **mine)
    for number, name in enumerate(methods, 1):
        method = asked(name).method
        begun = method.begin(local.reach(0))
        local.commit()
        states = []
        for engine in (local, remote):
            states.append(wire.pack(method.round(begun, engine.reach(number))))
            engine.commit()
        assert states[0] == states[1], name
    assert remote.rejected == []
    assert {silo: one.loads for silo, one in remote.opened.items()} == dict.fromkeys(SILOS, 1), "base models loaded"


def test_the_same_answer_from_the_same_passages(flower: Flower, embedder: str, tmp_path: Path) -> None:
    same_answer(*asked_there_and_here(flower, tmp_path, embedder, deadline=300.0))


def test_who_is_connected_is_told_and_a_kit_that_works_has_nothing_to_mend(
    flower: Flower, federation: Federation, fedtailor: Command
) -> None:
    ended = fedtailor("status", os.path.relpath(federation.kits["server"]))  # as one types it
    assert ended.code == 0
    assert re.findall(r"(\w+): last seen \d+ s ago", ended.out) == list(SILOS)
    for kit in ("server", "cafe"):
        assert [one for one in doctor.findings(federation.kits[kit]) if one.fine is False] == []


def test_bodies_of_several_pieces_come_back_whole_and_another_silos_worker_is_not_asked(
    flower: Flower, federation: Federation
) -> None:
    """cafe's courier is pointed to a worker of cafe's that echoes, clinic's to the worker of shop."""
    body = os.urandom(12_000_001)
    path = federation.kits["cafe"] / "echo.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        threading.Thread(target=echo, args=(listening,), daemon=True).start()
        said = {silo: federation.kits[silo] / "local" / "worker" for silo in ("cafe", "clinic")}
        said["cafe"].write_text("echo.sock\n")
        said["clinic"].write_text(str(federation.kits["shop"] / "silo" / "worker.sock"))
        try:
            found = {a.silo: a for a in flower.exchange(("cafe", "clinic"), {"kind": "echo", "sign": "ü"}, body, 120)}
        finally:
            for file in said.values():
                file.unlink()
    assert found["cafe"] == Answer("cafe", {"kind": "echo", "sign": "ü"}, body)
    assert "of silo 'shop', not of 'clinic'" in found["clinic"].lost


def echo(listening: socket.socket) -> None:
    with listening.accept()[0] as link:
        head, body = frames.receive(link)
        frames.send(link, {"silo": "cafe"})
        head, body = frames.receive(link)
        frames.send(link, head, body)


def test_a_silo_that_is_late_is_named_when_time_is_up(flower: Flower, federation: Federation) -> None:
    worker = psutil.Process(federation.running["cafe"].pid)
    worker.suspend()
    try:
        came = {answer.silo: answer.lost for answer in hello(flower, 12.0)}
    finally:
        worker.resume()
    assert came == {"cafe": "no reply within 12 s", "clinic": "", "shop": ""}


def test_one_program_at_a_time_and_one_server_at_a_port(flower: Flower, federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another program runs"):
        Flower(federation.kits["server"])
    server = kits.about(federation.kits["server"], "server")["server"]
    other = flower_kit.init(tmp_path / "fed", "demo", server, SILOS)
    with pytest.raises(UserError, match=r"port .* in use"):
        serve_server(other["server"])


def test_the_network_reaches_what_nodes_need_and_nothing_else(flower: Flower, federation: Federation) -> None:
    port = int(kits.about(federation.kits["server"], "server")["server"].rpartition(":")[2])
    found = [c for who in federation.kits for p in federation.processes(who) for c in p.net_connections("inet")]
    listening = {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", port) in listening
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    told = tomllib.loads((federation.kits["server"] / "flower" / "config.toml").read_text())
    inner = int(told["superlink"]["kit"]["address"].removeprefix("127.0.0.1:"))
    ca = federation.kits["cafe"] / "startup" / "ca.crt"
    for path, anyone in {"/v1/control/list-runs": 200, "/docs": 200, "/v1/runtime/acquire-task": 401}.items():
        assert status(inner, path, ca) == anyone, "what an account of the server's machine gets, with no key and no secret"
        for same in (path, f"/v1/fleet/..{path}", f"/v1/fleet/%2e%2e/..{path[3:]}", f"/{path}", path.upper()):
            assert status(port, same, ca) == 404, same
    assert status(port, "/v1/fleet/pull-messages", ca) == 401, "a node that proves no key"


def status(port: int, path: str, ca: Path) -> int:
    link = http.client.HTTPSConnection("localhost", port, timeout=30, context=ssl.create_default_context(cafile=str(ca)))
    with contextlib.closing(link):
        link.request("GET" if path.endswith("docs") else "POST", path, b"", {"content-type": "application/protobuf"})
        return link.getresponse().status


def test_a_node_with_another_key_is_refused(flower: Flower, federation: Federation, tmp_path: Path) -> None:
    """All that cafe has but its key."""
    shutil.copytree(federation.kits["cafe"] / "startup", tmp_path / "startup")
    shutil.copy(federation.kits["cafe"] / kits.ABOUT, tmp_path)
    other = flower_kit.init(tmp_path / "fed", "demo", "localhost:1", ["cafe"])["cafe"]
    shutil.copy(other / "startup" / "node.key", tmp_path / "startup")
    node = subprocess.Popen([*PROCESS, "courier", str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    log = tmp_path / "supernode.log"
    try:
        assert wait_for(lambda: log.exists() and "Failed to activate SuperNode" in log.read_text(), 60), log.read_text()
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(30)
    assert [answer.lost for answer in hello(flower)] == ["", "", ""]


EVIL = """
import pathlib
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
pathlib.Path({there!r}, pathlib.Path("/proc/self/cmdline").read_text().split(chr(0))[5]).touch()
server = ServerApp()
client = ClientApp()

@server.main()
def run(grid, context):
    sent = [Message(RecordDict(), node, "query.ask") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(sent, timeout=60)
    pathlib.Path({there!r}, "replies").write_text("|".join(str(one.error) for one in replies))
"""


def ended(server: Path, number: str) -> bool:
    (one,) = _flwr(server, ["list", "--run-id", number, "kit"], 60)["runs"]
    return str(one["status"]).startswith("finished")


@pytest.mark.parametrize("lax", [False, True], ids=["by the server", "by the silos"])
def test_an_app_that_carries_code_is_not_run(lax: bool, flower: Flower, federation: Federation, tmp_path: Path) -> None:
    """Submitted on the server's machine. Each silo refuses by its own rule, also where a server has dropped its own."""
    server, there = federation.kits["server"], tmp_path / "there"
    table = json.loads(json.dumps(flower_kit.APP))
    table["tool"]["flwr"]["app"]["components"] = {"serverapp": "evil:server", "clientapp": "evil:client"}
    app = tmp_path / "app"
    for folder in (there, app):
        folder.mkdir()
    (app / "pyproject.toml").write_text(tomli_w.dumps(table))
    (app / "evil.py").write_text(EVIL.format(there=str(there)))
    runs = server / "flower" / "bin" / "flwr-serverapp"
    strict = runs.read_text()
    if lax:
        line = "import sys; from flwr.superlink.cli import flwr_serverapp; sys.argv[:5] = ['flwr-serverapp']; flwr_serverapp()"
        runs.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{line}" - - - - "$@"\n')
    try:
        number = _flwr(server, ["run", str(app), "kit"], 60)["run-id"]
        assert wait_for(lambda: ended(server, number), 90)
    finally:
        runs.write_text(strict)
    found = sorted(file.name for file in there.iterdir())
    if lax:
        assert found == ["-", "replies"], "the server ran it, no silo did"
        assert (there / "replies").read_text().count("load") == len(SILOS)
    else:
        assert found == []


@pytest.mark.slow
def test_a_killed_node_and_a_killed_server_lose_nothing(flower: Flower, federation: Federation) -> None:
    """The node of cafe and the SuperLink, each during an exchange: Flower takes the node back after a minute."""
    spec = asked("prefix")
    striking = Striking(flower, {2: ("cafe", "flower-supernode"), 4: ("server", "flower-superlink")}, federation)
    state, remote = over(striking, spec, "killed")
    assert striking.struck == 2
    assert state == here(spec)
    assert remote.rejected == []
    assert {silo: one.loads for silo, one in remote.opened.items()} == dict.fromkeys(SILOS, 1)


@dataclass
class Striking:
    """A courier during some of whose exchanges a process is killed."""

    flower: Flower
    strikes: dict[int, tuple[str, str]]
    federation: Federation
    count: int = 0
    struck: int = 0

    @property
    def silos(self) -> tuple[str, ...]:
        return self.flower.silos

    def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
        self.count += 1
        if self.count in self.strikes:
            threading.Timer(1.0, self._strike, self.strikes[self.count]).start()
        return self.flower.exchange(to, head, body, timeout)

    def _strike(self, who: str, name: str) -> None:
        self.federation.kill(who, name)
        self.struck += 1
