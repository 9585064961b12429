"""Commands that run until they are stopped, as `fedtailor server KIT`: started by a test, and ended with it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import PROCESS, SLIM


@dataclass
class Kits:
    """A federation's kits, and the processes that run over them, by name."""

    kits: dict[str, Path]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def stop(self, *names: str) -> None:
        """All where none is named."""
        chosen = names or tuple(self.running)
        for name in chosen:
            self.running[name].send_signal(signal.SIGTERM)
        for name in chosen:
            self.running.pop(name).wait(60)

    def of(self, kit: str, fits: Callable[[list[str]], bool]) -> list[Any]:
        """The engine's processes that name this kit in a command line that fits."""
        import psutil  # comes with either engine

        found = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [p for p, line in found if str(self.kits[kit]) in line and fits(line)]


def killed(found: list[Any]) -> None:
    assert found, "none of these runs"
    for process in found:
        process.kill()


@dataclass
class Background:
    """`with Background(folder) as running:` each command's output is a file in the folder."""

    folder: Path  # the commands' own, too
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, *words: object) -> None:
        name = " ".join(map(str, words))
        with self.log(name).open("a") as log:
            given = [*PROCESS, *map(str, words)]
            self.running[name] = subprocess.Popen(given, stdout=log, stderr=log, cwd=self.folder, env=SLIM)

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_').replace('/', '_')[:100]}.log"

    def stop(self, *names: str) -> None:
        for name in names:
            self.running[name].send_signal(signal.SIGTERM)
        for name in names:
            self.running.pop(name).wait(30)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*self.running)


def trusting(kit: Path) -> None:
    """This silo reads the rows that the server's experiment names, as it may where all is on one machine."""
    file = kit / "silo.toml"
    file.write_text(f"server_names_data = true\n{file.read_text(encoding='utf-8')}", encoding="utf-8")


def wait_for(what: Callable[[], Any], seconds: float, pause: float = 0.3) -> bool:
    end = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < end:
        time.sleep(pause)
    return bool(done)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def left(folder: Path) -> list[str]:
    """Processes that name this folder in their command."""
    said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in said.splitlines() if str(folder) in line]

