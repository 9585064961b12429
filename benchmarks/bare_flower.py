"""Flower alone, for benchmarks/engines.py: its SuperLink and nodes as its documentation starts them, and an app of its own,
insecure and on 127.0.0.1. Nothing of fedtailor."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from sysconfig import get_path
from typing import Any

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "bare"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bare"
[tool.flwr.app.components]
serverapp = "bare.app:server"
clientapp = "bare.app:client"
[tool.flwr.app.config]
file = ""
repeats = 0
bytes = 0
nodes = 0
"""
APP = """
import json, os, time
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query("echo")
def echo(message, context):
    return Message(RecordDict(dict(message.content)), reply_to=message)

@server.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    def seconds(body):
        began = time.perf_counter()
        record = lambda: ArrayRecord({"body": Array("uint8", (len(body),), "safetensors", body)})
        asked = [Message(RecordDict({"body": record()}), node, "query.echo") for node in grid.get_node_ids()]
        came = list(grid.send_and_receive(asked, timeout=600))
        assert len(came) == config["nodes"] and not any(one.has_error() for one in came)
        return time.perf_counter() - began
    took = [seconds(b"") for _ in range(config["repeats"] + 1)][1:]
    found = {"took": took, "large": seconds(os.urandom(config["bytes"]))}
    with open(config["file"] + ".new", "w") as file:
        json.dump(found, file)
    os.rename(config["file"] + ".new", config["file"])
"""


@contextlib.contextmanager
def running(folder: Path, nodes: int) -> Iterator[None]:
    """A SuperLink, and its nodes connected to it."""
    port, *ports = _ports(nodes + 1)
    home = folder / "flower"
    home.mkdir()
    told = f'[superlink.bare]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "bare"\n{told}')
    environment = _environment(folder)
    commands = [["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
                 "--disable-runtime-dependency-installation", "--database", str(folder / "state.db")]]  # fmt: skip
    commands += [["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(one)]
                 for one in ports]  # fmt: skip
    started = []
    for number, command in enumerate(commands):
        log = (folder / f"{number}.log").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
        time.sleep(3 if number == 0 else 0)
    try:
        yield
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def measured(folder: Path, nodes: int, repeats: int, size: int) -> dict[str, Any]:
    app = folder / "app"
    (app / "bare").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "bare" / "__init__.py").write_text("")
    (app / "bare" / "app.py").write_text(APP)
    file = folder / "found.json"
    config = f'file="{file}" repeats={repeats} bytes={size} nodes={nodes}'
    subprocess.run(
        ["flwr", "run", str(app), "bare", "--run-config", config], env=_environment(folder), check=True
    )
    end = time.monotonic() + 900
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.5)
    found = json.loads(file.read_text())
    return {"trivial": statistics.median(found["took"]), "large": found["large"]}


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([get_path("scripts"), os.environ["PATH"]])
    return {
        **os.environ, "PATH": path, "FLWR_HOME": str(folder / "flower"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]
