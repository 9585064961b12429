"""The same experiment in one process and over workers in processes of their own: the same tensors, bit for bit.

Methods are found by themselves. One thread and cohorts of one everywhere, as for all bit-equal runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtailor import data, experiment, find, models, runs, wire
from fedtailor.engines.courier import Answer, Sockets
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.models import Resident
from tiny_runs import PUBLIC, kept

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
SILOS = ("cafe", "clinic", "shop")
METHODS = [  # tiny is a causal model; those that ask documents are in tests/test_rag_workers.py
    name for name, kind in find.methods().items() if "causal" in getattr(kind, "FOR", ("causal",)) and not hasattr(kind, "judge")
]


class Federation:
    """Three workers, each a process; `kill` ends one at once, and starts it again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.killing = threading.Lock()  # two kills of one silo at once would start two workers in one folder
        for silo in SILOS:
            (folder / silo).mkdir()
            (folder / silo / "silo.toml").write_text(f'name = "{silo}"\nserver_names_data = true\n')
            self.start(silo)
        self.sockets = Sockets({silo: folder / silo / "silo" / "worker.sock" for silo in SILOS})

    def start(self, silo: str) -> None:
        command = [sys.executable, "-c", "from fedtailor.cli import main; main()", "silo"]
        log = (self.folder / silo / "log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes[silo] = subprocess.Popen(
            [*command, "--config", str(self.folder / silo / "silo.toml")], stderr=log, env=environment
        )

    def kill(self, silo: str) -> None:
        """Returns once the new one listens."""
        with self.killing:
            self.processes[silo].kill()
            self.processes[silo].wait()
            self.start(silo)
            while next(self.sockets.exchange([silo], {"kind": "hello"}, b"", 5)).lost:
                time.sleep(0.1)

    def stop(self) -> list[int]:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        return [process.wait(30) for process in self.processes.values()]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one = Federation(tmp_path_factory.mktemp("federation"))
    yield one
    assert one.stop() == [0, 0, 0]


def asked(*sets: str) -> experiment.Experiment:
    return experiment.load(TINY, ["rounds=2", "engine.cohort=1", *kept(sets), *sets])


def here(one: experiment.Experiment) -> Any:
    silos = data.load(one.data, one.silo, 0).silos
    return experiment.run(one, InProcess(silos, {"base": models.load(one.model)}, rounds=one.rounds, public=PUBLIC))


def afar(one: experiment.Experiment, federation: Federation, run: str) -> tuple[Any, Remote]:
    mine: Any = {"public": PUBLIC, "models": {"base": models.load(one.model)}}
    engine = Remote(federation.sockets, Open(run, 0, one.data, one.model, one.silo, 1), rounds=one.rounds, **mine)
    return experiment.run(one, engine), engine


@pytest.mark.parametrize("method", METHODS)
def test_over_sockets(federation: Federation, method: str) -> None:
    one = asked(f"method.name={method}")
    report, engine = afar(one, federation, method)
    expected = here(one)
    assert wire.pack(report.state) == wire.pack(expected.state)
    assert [entry["val"] for entry in report.log] == [entry["val"] for entry in expected.log]
    assert {found.loads for found in engine.opened.values()} == {1}, "the base is loaded once, whatever the method"


def test_a_whole_search_over_sockets(federation: Federation, tmp_path: Path) -> None:
    """Its rows that need no pooled data, and the prompts compared on the test rows, where these are."""
    rows = ["zero_shot", "hand_written", "federated", "centralized"]
    sets = ["method.name=search", "method.calls=24", 'data.labels=["bad","good"]', f"rows={json.dumps(rows)}"]
    one = asked("engine.threads=1", *sets)
    afar = runs.begin(one, tmp_path / "afar", "a test", federation.sockets).conduct()["rows"]
    assert list(afar) == rows[:3]
    expected = runs.begin(one, tmp_path / "here", "a test").conduct()["rows"]
    for row in rows[:3]:
        assert afar[row]["accuracy"] == expected[row]["accuracy"]
    assert afar["federated"]["paired"] == {"hand_written": expected["federated"]["paired"]["hand_written"]}
    assert afar["federated"]["prompt"] == expected["federated"]["prompt"]


def base_of(folder: Path, architecture: str, load: Callable[[str], Any], resident: Resident) -> list[str]:
    """What sets such a base, out of a folder, and rows that it can read."""
    load(architecture).save_pretrained(folder)
    resident.save_reader(folder)
    sets = [f"model.name={folder}"]
    if architecture != "vit":
        return sets
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [(picture * 15, n) for picture, n in zip(digits.images, digits.target, strict=True) if n < 2]
    lines = [
        json.dumps({"site": SILOS[i % 3], "picture": p.astype(int).tolist(), "mood": ("nought", "one")[n]})
        for i, (p, n) in enumerate(chosen)
    ]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    return [*sets, f"data.source={folder}/digits.jsonl", "data.template=", "data.image=picture"]


@pytest.mark.parametrize(("architecture", "method"), [("bert", "head"), ("bert", "lora"), ("t5", "prefix"), ("vit", "prefix")])
def test_other_bases_over_sockets(
    federation: Federation, tmp_path: Path, plain: Callable[[str], Any], resident_of: Callable[[str], Resident],
    architecture: str, method: str,
) -> None:  # fmt: skip
    sets = base_of(tmp_path, architecture, plain, resident_of(architecture))
    one = asked(f"method.name={method}", *sets)
    assert models.load(one.model).kind == {"bert": "encoder", "t5": "seq2seq", "vit": "vision"}[architecture]
    report, _ = afar(one, federation, f"{architecture}-{method}")
    expected = here(one)
    assert wire.pack(report.state) == wire.pack(expected.state)
    assert [entry["val"] for entry in report.log] == [entry["val"] for entry in expected.log]


@dataclass
class Striking:
    """A courier during some of whose exchanges a worker is killed: while it trains, answers, or between."""

    federation: Federation
    dice: random.Random = field(default_factory=random.Random)
    count: int = 0
    kills: list[threading.Thread] = field(default_factory=list)

    @property
    def silos(self) -> tuple[str, ...]:
        return SILOS

    def exchange(self, to: Sequence[str], head: Any, body: bytes, timeout: float) -> Iterator[Answer]:
        self.count += 1
        if self.count in (5, 11, 12, 20):
            delay, silo = self.dice.random() / 5, self.dice.choice(SILOS)
            self.kills.append(threading.Timer(delay, self.federation.kill, [silo]))
            self.kills[-1].start()
        return self.federation.sockets.exchange(to, head, body, timeout)


def test_workers_killed_in_the_middle(federation: Federation) -> None:
    one, striking = asked("rounds=12", "evaluate.every=12"), Striking(federation)
    engine = Remote(striking, Open("killed", 0, one.data, one.model, one.silo, 1), rounds=one.rounds, deadline=300)
    report = experiment.run(one, engine)
    for kill in striking.kills:
        kill.join()
    assert len(striking.kills) == 4
    assert wire.pack(report.state) == wire.pack(here(one).state)
    assert engine.rejected == []
