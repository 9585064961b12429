"""Flower as courier: TLS, a key for each silo's node, and nothing of ours runs by it but two thin ends.

    Flower(kit)               what the server program hands to `Remote`
    serve_server, serve_client    keep the engine's own processes of a kit running

The run is disposable: it is submitted when an exchange needs it, and again when it is lost. State and models lie in the
program and the workers. Flower asks for news every 3 s and starts a process for each message: seconds for each exchange.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fedtailor.engines import flower_kit
from fedtailor.engines import kit as kits
from fedtailor.engines.courier import Answer, Head, Link
from fedtailor.engines.flower_kit import LIMIT, guarded
from fedtailor.engines.keeping import Kept, ends_with, keep, kill
from fedtailor.engines.program import Program
from fedtailor.errors import FedtailorError, printable
from fedtailor.packed import Packed

log = logging.getLogger("fedtailor.flower")

START = 60.0  # seconds that a run may take from submission to its first word
COMMAND = 60.0  # seconds that one of Flower's commands may take
REGISTER = 5.0  # seconds between two tries to register the silos' nodes
RETURN = 5.0  # seconds at most between two starts of a node: its server refuses it for a minute after it was killed
WARNING = (
    "Flower's control interface is anonymous: who reaches it may start runs and register nodes. It listens on 127.0.0.1 alone: "
    "trust every account of this machine, or use NVFlare. The network reaches port %s, where nodes prove their keys; "
    "neither here nor at a silo is any app run but fedtailor's."
)
GATE = "fedtailor.engines.flower_gate"
COMMANDS = (GATE, "flwr", "flower-superlink", "flower-superexec", "flower-supernode", *flower_kit.APPS)

needed = flower_kit.needed


class Lost(FedtailorError):
    """The run, or the engine's server, is not there."""


@dataclass
class Flower:
    """A `Courier` over the federation whose server's kit this is. One exchange at a time; one program for a kit."""

    kit: Path
    patience: float = 120.0  # seconds that one exchange waits at most for the engine and the run, its timeout aside

    def __post_init__(self) -> None:
        needed()
        self.kit = self.kit.resolve()
        self.silos = tuple(sorted(kits.about(self.kit, "server")["silos"]))
        self._program = Program(self.kit)
        self._link: Link | None = None
        self._starting = ("", 0.0)  # the run that was submitted and has not called yet; when it is given up

    def __enter__(self) -> Flower:
        return self

    def __exit__(self, *_: object) -> None:
        """The run ends by itself when its link is closed."""
        self._drop()
        self._program.close()

    def exchange(self, to: Sequence[str], head: Head, body: Packed, timeout: float) -> Iterator[Answer]:
        end, waiting = time.monotonic() + timeout, list(to)
        if len(body) > LIMIT:
            why = f"a request of {len(body)} bytes; Flower carries {LIMIT} at most: use NVFlare"
            yield from (Answer(silo, {"kind": "refused", "why": why}) for silo in waiting)
            return
        if not waiting:
            return
        try:
            link = self._ready(min(end, time.monotonic() + self.patience))
            yield from self._program.exchange(link, waiting, head, body, end)
        except (OSError, FedtailorError) as error:
            why = str(error) or "it said nothing in time"
            if self._link is not None:
                log.warning("the run is lost: %s", why)
            self._drop()
            for silo in waiting:
                yield Answer(silo, lost=f"Flower's run is lost: {why}")

    def _ready(self, end: float) -> Link:
        """A link to a run. Raises Lost when there is none in time."""
        if self._link is not None and self._link.ended():
            self._drop()
        while self._link is None:
            number, given_up = self._starting
            if time.monotonic() > given_up:
                number = os.urandom(8).hex()
                asked = ["run", str(self.kit / "flower" / "app"), "kit", "--run-config", f'job="{number}"']
                _flwr(self.kit, asked, max(1.0, min(COMMAND, end - time.monotonic())))
                self._starting = (number, time.monotonic() + START)
            elif time.monotonic() > end:
                raise Lost("it is still starting")
            elif (called := self._program.called(number, min(0.5, end - time.monotonic()))) is not None:
                self._link, self._starting = called[0], ("", 0.0)
        return self._link

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None


def _flwr(folder: Path, asked: Sequence[str], seconds: float) -> dict[str, Any]:
    """What one of the `flwr` commands says. Raises Lost, in one line, where it fails."""
    folder = folder.resolve()  # the command runs in it: a relative path would be looked for, and made, below it
    command = [*guarded(folder, "flwr"), *asked, "--format", "json"]
    if not (folder / "flower" / "config.toml").exists():
        raise Lost("the engine's server was never started; run `fedtailor server` first")
    try:
        ended = subprocess.run(
            command, cwd=folder, env=flower_kit.environment(folder), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(ended.stdout[ended.stdout.index("{") :])
    except subprocess.TimeoutExpired:
        raise Lost(f"`flwr {asked[0]}` took longer than {seconds:.3g} s") from None
    except ValueError:
        raise Lost(f"`flwr {asked[0]}` failed: {_line((ended.stderr or ended.stdout)[-300:])}") from None
    if not found.get("success"):
        told = _line(str(found.get("error-message"))[:300])
        raise Lost(f"the engine's server does not answer ({told}); is `fedtailor server` running?")
    return found


def _line(said: str) -> str:
    return printable(" ".join(said.split()))


def courier(kit: Path) -> Flower:
    """The courier of a server's kit, whose federation.toml says `engine = "flower"`."""
    return Flower(kit)


def serve_server(folder: Path) -> None:
    """Keep the engine's server of this kit running, until SIGTERM or SIGINT. Raises UserError where its port is taken."""
    needed()
    folder = folder.resolve()
    port = kits.about(folder, "server")["server"].rpartition(":")[2]
    log.warning(WARNING, port)

    def made() -> list[Kept]:
        inner = _unused()
        environment = flower_kit.settle(folder, f"127.0.0.1:{inner}")
        startup, secret = folder / "startup", str(folder / "flower" / "secret")
        files = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        link = [
            *guarded(folder, "flower-superlink"), "--host", "127.0.0.1", "--port", str(inner),
            *(str(startup / one) if one.startswith(("ca", "server")) else one for one in files),
            "--enable-supernode-auth", "--database", str(folder / "flower" / "state.db"), "--isolation", "process",
            "--superexec-auth-secret-file", secret, "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        gate = [sys.executable, "-P", "-m", GATE, str(folder), str(inner)]
        runs = [*_superexec(folder, inner), "--root-certificates", str(startup / "ca.crt")]
        threading.Thread(target=_registered, args=(folder,), daemon=True).start()
        commands = {"superlink": link, "gate": gate, "superexec": runs}
        return [Kept(line, folder / f"{name}.log", environment) for name, line in commands.items()]

    keep(folder, made, lambda: end_strays(folder), port=int(port))


def serve_client(folder: Path, worker: BinaryIO | None = None) -> None:
    """Keep the engine's node of this silo running, until SIGTERM or SIGINT, or until its worker is gone: see `ends_with`."""
    needed()
    folder = folder.resolve()
    server = kits.about(folder, "silo")["server"]

    def made() -> list[Kept]:
        inner, environment = _unused(), flower_kit.settle(folder)
        startup, secret = folder / "startup", str(folder / "flower" / "secret")
        node = [
            *guarded(folder, "flower-supernode"), "--superlink", server, "--root-certificates", str(startup / "ca.crt"),
            "--auth-supernode-private-key", str(startup / "node.key"), "--host", "127.0.0.1", "--port", str(inner),
            "--isolation", "process", "--superexec-auth-secret-file", secret,
        ]  # fmt: skip
        runs = [*_superexec(folder, inner), "--insecure"]  # on this machine: the secret keeps its other accounts out
        strays = partial(end_strays, folder, ("flwr-clientapp",))
        kept = Kept(node, folder / "supernode.log", environment, strays, RETURN)
        # An app that is stopped gives no answer, and a node waits for it for ever.
        return [kept, Kept(runs, folder / "superexec.log", environment, takes=[kept])]

    keep(folder, made, lambda: end_strays(folder), patience=math.inf, holds=ends_with(worker, folder))


def _superexec(folder: Path, port: int) -> list[str]:
    """What starts the apps: only who knows the secret is given them."""
    asked = ["--runtime-api-address", f"127.0.0.1:{port}", "--superexec-auth-secret-file", str(folder / "flower" / "secret")]
    return [*guarded(folder, "flower-superexec"), *asked]


def seen(folder: Path) -> dict[str, float]:
    """When each silo that is connected was last seen: now, as Flower tells it. Raises Lost when the server does not answer."""
    folder = folder.resolve()
    told = _flwr(folder, ["supernode", "list", "kit"], COMMAND)["nodes"]
    online = {node["node-id"] for node in told if node["status"] == "online"}
    return {silo: time.time() for silo, node in _nodes(folder).items() if node in online}


def _nodes(folder: Path) -> dict[str, str]:
    """The number of each silo's node, as far as it is registered."""
    file = folder / "flower" / "nodes.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _registered(folder: Path) -> None:
    """Tell the SuperLink of the silos' keys, until it knows them all. It keeps them, and refuses them the second time."""
    waiting = sorted((folder / "nodes").glob("*.pub"))
    while waiting:
        silo = waiting[0].stem
        try:
            said = _flwr(folder, ["supernode", "register", str(waiting[0]), "kit", "--name", silo], COMMAND)
            kits.write(folder / "flower" / "nodes.json", _nodes(folder) | {silo: str(said["node-id"])})
            log.info("the node of %s is registered", silo)
        except Lost as error:
            if "already in use" not in str(error):
                time.sleep(REGISTER)
                continue
        del waiting[0]


def _unused() -> int:
    """A port of this machine alone that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def end_strays(folder: Path, commands: Sequence[str] = COMMANDS) -> None:
    """End processes of this kit that outlived what kept them, or what started them."""
    kill(lambda line: str(folder) in line and any(word in commands for word in line))
