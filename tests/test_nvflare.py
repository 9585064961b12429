"""A real federation on 127.0.0.1: the engine's server, three silos with their workers, mutual TLS. In order of the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from fedtailor import data as rows
from fedtailor import experiment, find, models, wire
from fedtailor.engines import courier, doctor, frames, nvflare_admin, nvflare_kit
from fedtailor.engines.courier import Answer
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.nvflare import NVFlare, serve_server
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.errors import UserError

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

import psutil  # noqa: E402  (comes with NVFlare)

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
SILOS = ("cafe", "clinic", "shop")
SERVE = "import sys; from pathlib import Path; from fedtailor.engines import nvflare; nvflare.serve_{}(Path(sys.argv[1]))"
WORKER = "import sys; from fedtailor.cli import main; main(['silo', '--config', sys.argv[1]])"


@dataclass
class Federation:
    """Kits, and the processes that run over them."""

    kits: dict[str, Path]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, what: str, **environment: str) -> None:
        """server, SILO (its engine) or worker:SILO."""
        kit = self.kits[what.rpartition(":")[2]]
        code, argument = SERVE.format("server" if what == "server" else "client"), kit
        if what.startswith("worker:"):
            code, argument = WORKER, kit / "silo.toml"
            argument.write_text(f'name = "{kit.name}"\n', encoding="utf-8")
        with (kit / f"test-{what.partition(':')[0]}.log").open("a") as log:
            command = [sys.executable, "-c", code, str(argument)]
            self.running[what] = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)

    def stop(self, *names: str) -> None:
        for name in names:
            self.running[name].send_signal(signal.SIGTERM)
        for name in names:
            self.running.pop(name).wait(30)

    def processes(self, kit: str, module: str = "nvflare.private") -> list[psutil.Process]:
        """The engine's own, by their module."""
        found = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [p for p, line in found if str(self.kits[kit]) in line and any(module in word for word in line)]

    def kill(self, kit: str, module: str) -> None:
        found = self.processes(kit, module)
        assert found, f"no {module} runs"
        for process in found:
            process.kill()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("f")
    made = Federation(nvflare_kit.init(folder / "fed", "demo", f"localhost:{free_port()}", SILOS, 3))
    try:
        for what in ("server", *SILOS, *(f"worker:{silo}" for silo in SILOS)):
            made.start(what)
        yield made
    finally:
        made.stop(*made.running)
        left = [process for kit in made.kits for process in made.processes(kit)]
        for process in left:
            process.kill()
    assert left == [], "the engine's processes outlived it"


@pytest.fixture(scope="module")
def flare(federation: Federation) -> Iterator[NVFlare]:
    one = NVFlare(federation.kits["server"])
    try:
        assert wait_for(lambda: not [a for a in hello(one, 60) if a.lost], 120), "the federation did not come up"
        yield one
    finally:
        one.close()


def hello(flare: NVFlare, timeout: float = 30.0, body: bytes = b"") -> list[Answer]:
    return list(flare.exchange(SILOS, {"kind": "hello"}, body, timeout))


def wait_for(what: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(done)


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
        remote = Remote(flare, opening, rounds=self.spec.rounds, deadline=120.0)
        return wire.pack(experiment.run(self.spec, remote).state), remote


def case(*sets: str) -> Case:
    torch.set_num_threads(1)  # a module's fixture comes before what sets it for each test
    spec = experiment.load(TINY, ["method.optimizer_state=keep", *sets])
    silos = rows.load(spec.data, spec.silo, 0).silos
    assert tuple(sorted(silos)) == SILOS
    local = InProcess(silos, {"base": models.load(spec.model)}, rounds=spec.rounds, run="local")
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


@pytest.mark.parametrize("method", sorted(find.methods()))
def test_the_same_tensors_whatever_the_method(flare: NVFlare, method: str) -> None:
    one = case(f"method.name={method}", "rounds=2")
    state, remote = one.over(flare)
    assert state == one.state
    assert remote.rejected == []


def test_who_is_connected_is_told_and_a_kit_that_works_has_nothing_to_mend(
    flare: NVFlare, federation: Federation, fedtailor: Command
) -> None:
    ended = fedtailor("status", federation.kits["server"])
    assert ended.code == 0
    assert re.findall(r"(\w+): last seen \d+ s ago", ended.out) == list(SILOS)
    for kit in ("server", "cafe"):
        assert [one for one in doctor.findings(federation.kits[kit]) if not one.fine] == []


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
def echo(federation: Federation) -> Iterator[Path]:
    """A worker of cafe's that sends back what it gets."""
    path = federation.kits["cafe"] / "echo.sock"
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def talk(link: socket.socket) -> None:
        with link:
            try:
                while True:
                    head, body = frames.receive(link)
                    frames.send(link, {"silo": "cafe"} if head == {"kind": "hello"} else head, body)
            except frames.FrameError:
                pass

    def serve() -> None:
        while True:
            try:
                link = listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=talk, args=(link,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    said = federation.kits["cafe"] / "local" / "worker"
    said.write_text("echo.sock\n")
    yield path
    said.unlink()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


@pytest.mark.parametrize("size", [0, 1, 16 * 1024**2, 16 * 1024**2 + 1, 40_000_000])
def test_bodies_of_any_size_come_back_whole(size: int, flare: NVFlare, echo: Path) -> None:
    body = os.urandom(size)
    (answer,) = flare.exchange(["cafe"], {"kind": "echo", "braces": "{}", "sign": "ü"}, body, 60)
    assert answer.lost == ""
    assert answer.head == {"kind": "echo", "braces": "{}", "sign": "ü"}
    assert answer.body == body


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


def test_another_silos_worker_is_not_asked(flare: NVFlare, federation: Federation) -> None:
    said = federation.kits["cafe"] / "local" / "worker"
    said.write_text(str(federation.kits["shop"] / "silo" / "worker.sock"))
    try:
        (answer,) = flare.exchange(["cafe"], {"kind": "hello"}, b"", 30)
    finally:
        said.unlink()
    assert "of silo 'shop', not of 'cafe'" in answer.lost


@pytest.mark.parametrize("work", ["os:system", "fedtailor.models:load", "../x:y", "fedtailor.engines.nvflare:job"])
def test_work_that_is_not_in_silo_is_refused(work: str, flare: NVFlare, tiny: Case) -> None:
    _, remote = tiny.over(flare)  # the run is open
    head = {"kind": "ask", "run": remote.run, "round": 99, "index": 0, "work": work, "committed": -1}
    for answer in flare.exchange(SILOS, head, wire.pack(remote.opening), 30):
        assert answer.lost == ""
        assert answer.head["kind"] == "refused"


def test_one_program_at_a_time(flare: NVFlare, federation: Federation) -> None:
    with pytest.raises(UserError, match="another program runs"):
        NVFlare(federation.kits["server"])
    assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def test_only_the_documented_port_is_open(federation: Federation, flare: NVFlare) -> None:
    port = int(nvflare_kit.about(federation.kits["server"], "server")["server"].rpartition(":")[2])
    found = [c for kit in federation.kits for p in federation.processes(kit) for c in p.net_connections("inet")]
    listening = {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", port) in listening
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1"}


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


CURIOUS = """
import pathlib, sys
if "nvflare.private.fed.app.client.worker_process" in pathlib.Path("/proc/self/cmdline").read_text().split(chr(0)):
    import threading, time
    from nvflare.collab import collab
    from nvflare.collab.api.context import get_call_context, set_call_context
    from fedtailor.engines import nvflare_ends as ends

    @collab.init
    def start(self):
        context = get_call_context()
        def ask():
            set_call_context(context)
            out = open(sys.argv[sys.argv.index("-m") + 1] + "/curious.txt", "w")
            for _ in range(5):
                time.sleep(1)
                for other in collab.other_clients:
                    head = ends.tohex({"kind": "hello"})
                    for call, given in (("ask", ("1", head, 5.0, b"")), ("get", ("1", 0)), ("put", ("1", 0, b""))):
                        try:
                            print(call, "got", getattr(other(timeout=5), call)(*given), file=out, flush=True)
                        except Exception as error:
                            print(call, error, file=out, flush=True)
        threading.Thread(target=ask, daemon=True).start()
    ends.SiloEnd.start = start
"""


def test_a_silo_that_asks_another_is_refused(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """clinic's own process is changed by its owner; that it came back makes it a member of a new job."""
    (tmp_path / "sitecustomize.py").write_text(CURIOUS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    federation.stop("clinic")
    federation.start("clinic", PYTHONPATH=path)
    told = federation.kits["clinic"] / "curious.txt"
    try:
        assert wait_for(lambda: not [a for a in hello(flare) if a.lost] and told.exists(), 60)
        assert wait_for(lambda: told.read_text().count("\n") >= 24, 30)
    finally:
        federation.stop("clinic")
        federation.start("clinic")
    lines = told.read_text().splitlines()
    assert [line for line in lines if " got " in line] == []
    for call in ("ask", "get", "put"):
        assert [line for line in lines if line.startswith(call) and "clinic is not the server" in line]
    assert wait_for(lambda: not [a for a in hello(flare) if a.lost], 60)


def submitted(kit: Path, folder: Path, change: Callable[[Path], None]) -> dict[str, Any]:
    """What the server knows of a changed job of ours when it is over: status, job_deploy_detail, ..."""
    job = folder / "fedtailor"
    for name, table in nvflare_admin.job("0" * 16, SILOS).items():
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(json.dumps(table), encoding="utf-8")
    change(job)
    session = nvflare_admin.login(kit)
    try:
        number = session.submit_job(str(job))

        assert wait_for(lambda: session.get_job_meta(number)["status"].startswith("FINISHED"), 60)
        return dict(session.get_job_meta(number))
    finally:
        session.close()


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_job_that_names_another_class_is_refused(
    side: str, flare: NVFlare, federation: Federation, tmp_path: Path
) -> None:
    there = tmp_path / "was-here"

    def change(job: Path) -> None:
        file = job / "app" / "config" / f"config_fed_{side}.json"
        table = json.loads(file.read_text())
        evil = {"id": "evil", "path": "subprocess.Popen", "args": {"args": ["touch", str(there)]}}
        file.write_text(json.dumps(table | {"components": [*table["components"], evil]}))

    found = submitted(federation.kits["server"], tmp_path, change)
    assert found["status"] in ("FINISHED:EXECUTION_EXCEPTION", "FINISHED:ABNORMAL", "FINISHED:ABORTED")
    if side == "client":  # each silo has refused by its own rule
        for silo in SILOS:
            logs = [path.read_text() for path in federation.kits[silo].rglob("*log.txt")]
            assert [text for text in logs if "'subprocess.Popen'" in text and "is not in allow_list" in text]
    assert not there.exists()


def test_a_foreign_certificate_is_refused(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    server = nvflare_kit.about(federation.kits["server"], "server")["server"]
    foreign = nvflare_kit.init(tmp_path / "fed", "demo", server, SILOS)
    with pytest.raises(Exception, match=r"cannot connect|timed out|timeout|connection"):
        nvflare_admin.login(foreign["server"])
    with pytest.raises(UserError, match=r"port .* in use"):
        serve_server(foreign["server"])


def test_a_silo_cannot_pose_as_the_admin(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """cafe holds a certificate of this federation, and a copy of all else that the admin has."""
    shutil.copytree(federation.kits["server"] / "admin", tmp_path / "admin")
    for name in ("client.crt", "client.key"):
        shutil.copy(federation.kits["cafe"] / "startup" / name, tmp_path / "admin" / "startup" / name)
    with pytest.raises(Exception, match=r"(?i)registration|authent|connect|identity"):
        nvflare_admin.login(tmp_path)


def test_the_programs_socket_is_its_owners_alone(flare: NVFlare, federation: Federation) -> None:
    assert (federation.kits["server"] / nvflare_kit.SOCKET).stat().st_mode & 0o077 == 0
    assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def test_a_stranger_at_the_programs_socket_changes_nothing(flare: NVFlare, federation: Federation) -> None:
    with courier.connect(federation.kits["server"] / nvflare_kit.SOCKET, 5) as link:
        frames.send(link, {"kind": "job", "job": "another", "silos": list(SILOS)})
        assert [answer.lost for answer in hello(flare)] == ["", "", ""]


@pytest.mark.parametrize("lax", [False, True], ids=["by the server", "by the silos"])
def test_a_job_that_carries_code_is_refused(
    lax: bool, flare: NVFlare, federation: Federation, tmp_path: Path
) -> None:
    """Each silo refuses by its own rule, also where a server has loosened its own."""
    there, rules = tmp_path / "was-here", federation.kits["server"] / "local" / "authorization.json"
    strict = rules.read_text()

    def change(job: Path) -> None:
        (job / "app" / "custom").mkdir()
        (job / "app" / "custom" / "sitecustomize.py").write_text(f"open({str(there)!r}, 'w')")

    if lax:
        federation.stop("server")
        rules.write_text(strict.replace('"byoc": "none"', '"byoc": "any"'))
        federation.start("server")
        assert wait_for(lambda: not [a for a in hello(flare) if a.lost], 90)
    try:
        found = submitted(federation.kits["server"], tmp_path, change)
    finally:
        rules.write_text(strict)
    assert found["status"] == "FINISHED:FAILED_TO_RUN"
    for who in SILOS if lax else ("server",):
        assert [line for line in found["job_deploy_detail"] if line.startswith(who) and "BYOC not permitted" in line]
    assert not there.exists()
