"""What tests over NVFlare share: a real federation on 127.0.0.1, the engine's server and three silos with their workers.

It is started once for all files. Every test leaves it as it was: all of it running, every silo connected.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from background import Kits, free_port, killed, wait_for
from fedtailor.engines import kit as kits
from fedtailor.engines import nvflare_admin, nvflare_kit
from fedtailor.engines.courier import Answer
from fedtailor.engines.nvflare import NVFlare

SILOS = ("cafe", "clinic", "shop")
SERVE = "import sys; from pathlib import Path; from fedtailor.engines import nvflare; nvflare.serve_{}(Path(sys.argv[1]))"
WORKER = "import sys; from fedtailor.cli import main; main(['silo', '--config', sys.argv[1]])"
OWN = ("*.sock", "*.log", "log*.txt", "log.json", ".engine", ".program", "silo", "spool", "*-*-*-*-*", "jobs", "snapshots")


class Federation(Kits):
    @property
    def port(self) -> int:
        return int(nvflare_kit.about(self.kits["server"], "server")["server"].rpartition(":")[2])

    def copied(self, kit: str, folder: Path, port: int | None = None) -> Path:
        """The same kit in another folder, known by its name, without what its processes left; with another server's port."""
        shutil.copytree(self.kits[kit], folder, ignore=shutil.ignore_patterns(*OWN))
        for file in folder.rglob("*.json") if port else ():
            file.write_text(file.read_text().replace(f":{self.port}", f":{port}").replace(f": {self.port}", f": {port}"))
        self.kits[folder.name] = folder
        return folder

    def start(self, what: str, limit: int = 0, **environment: str) -> None:
        """server, SILO (its engine) or worker:SILO, which takes messages of `limit` bytes at most."""
        kit = self.kits[what.rpartition(":")[2]]
        code, argument = SERVE.format("server" if (kit / "federation.toml").exists() else "client"), kit
        if what.startswith("worker:"):
            code, argument = WORKER, kit / "silo.toml"
            own = f'name = "{kit.name}"\nserver_names_data = true\n'
            argument.write_text(own + (f"body_limit = {limit}\n" if limit else ""), encoding="utf-8")
        with (kit / f"test-{what.partition(':')[0]}.log").open("a") as log:
            command = [sys.executable, "-c", code, str(argument)]
            self.running[what] = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)

    def processes(self, kit: str, module: str = "nvflare.private") -> list[Any]:
        """The engine's own, by their module."""
        return self.of(kit, lambda line: any(module in word for word in line))

    def kill(self, kit: str, module: str) -> None:
        killed(self.processes(kit, module))


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("f")
    made = Federation(nvflare_kit.init(folder / "fed", "demo", f"localhost:{free_port()}", SILOS, 3))
    file = made.kits["server"] / "startup" / "fed_server.json"  # bound as where the name is none of loopback's
    file.write_text(file.read_text().replace("localhost:", "fl.example:"))
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


@pytest.fixture(scope="session")
def flare(federation: Federation) -> Iterator[NVFlare]:
    one = NVFlare(federation.kits["server"])
    try:
        assert wait_for(lambda: not [a for a in hello(one, 60) if a.lost], 120), "the federation did not come up"
        yield one
    finally:
        one.close()


def hello(flare: NVFlare, timeout: float = 30.0, body: bytes = b"") -> list[Answer]:
    return list(flare.exchange(SILOS, {"kind": "hello"}, body, timeout))


def names_one_alone(flare: NVFlare, lie: str, liar: str, told: str) -> None:
    """Asked to tell this lie, this silo is lost with the reason, and the others answer."""
    answers = {one.silo: one.lost for one in flare.exchange(SILOS, {"kind": "hello", "lie": lie}, b"", 30)}
    assert told in answers.pop(liar)
    assert set(answers.values()) == {""}


def all_answer(flare: NVFlare, seconds: float = 90.0) -> bool:
    return wait_for(lambda: not [one for one in hello(flare) if one.lost], seconds)


@contextmanager
def listening(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[None]:
    """What takes a worker's place at a unix socket: `talk` gets each connection, in a thread of its own."""
    path.unlink(missing_ok=True)
    place = socket.socket(socket.AF_UNIX)
    place.bind(str(path))
    place.listen()

    def serve() -> None:
        while True:
            try:
                link = place.accept()[0]
            except OSError:
                return
            threading.Thread(target=talk, args=(link,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        place.shutdown(socket.SHUT_RDWR)
        place.close()


@contextmanager
def worker_at(kit: Path, place: str) -> Iterator[None]:
    """This silo's courier looks for its worker there."""
    said = kit / "local" / kits.WORKER
    said.write_text(f"{place}\n")
    try:
        yield
    finally:
        said.unlink()


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
