"""Questions to silos in processes of their own: the answers of one process, and a silo that is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import Ended
from fedtailor import models
from fedtailor.data import Data, SiloData
from fedtailor.engines.courier import Sockets
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.methods.rag import Rag
from fedtailor.models import Base
from fedtailor.retrieval import session
from fedtailor.retrieval.answered import Answered
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.session import Session
from libraries import LIBRARIES, corpora, indexes

TINY = Base("tiny", dtype="float32")
BLANK = Data(source="", template="{question}", answer="answer", silo_column="silo")
QUESTION = "how does an oak grow, and a cat sit"


class Silos:
    """Workers that know of no rows, but of an index."""

    def __init__(self, folder: Path, embedder: str, **more: str) -> None:
        self.folder = folder
        self.made = indexes(folder, embedder)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for silo, index in self.made.items():
            (folder / silo).mkdir()
            told = "".join(f"{key} = {value}\n" for key, value in more.items())
            file = folder / silo / "silo.toml"
            file.write_text(f'name = "{silo}"\n[documents]\nindex = "../{index.name}"\n{told}')
            self.start(silo)
        self.sockets = Sockets({silo: folder / silo / "silo" / "worker.sock" for silo in self.made})

    def start(self, silo: str) -> None:
        command = [sys.executable, "-c", "from fedtailor.cli import main; main()", "silo", "--config"]
        log = (self.folder / silo / "log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes[silo] = subprocess.Popen([*command, str(self.folder / silo / "silo.toml")], stderr=log, env=environment)

    def session(self, method: Rag) -> Session:
        base = models.load(TINY)
        opening = Open("ask", 0, BLANK, TINY, threads=1)
        engine = Remote(self.sockets, opening, deadline=60, patience=1, models={"base": base})
        return session.asking(method, engine, base)

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> Iterator[Silos]:
    one = Silos(tmp_path_factory.mktemp("silos"), embedder, words_per_day="30", share='"snippets"', words="5")
    yield one
    one.stop()


def method(embedder: str, **more: object) -> Rag:
    return Rag(embedder=embedder, floor=0.0, words_share=0.9, max_new_tokens=4, **more)  # type: ignore[arg-type]


def last(one: Session, question: str = QUESTION) -> Answered:
    return [*one.ask(question)][-1]


def test_as_in_one_process_and_a_limit_that_holds(silos: Silos, embedder: str) -> None:
    """Under the policy of each silo.toml: five words of a passage; then 30 words are told, and no more today."""
    asked = silos.session(method(embedder))
    found = last(asked)
    data = {
        silo: SiloData((), (), (), corpus=one)
        for silo, one in corpora(silos.made, Policy(share="snippets", words=5)).items()
    }
    base = models.load(TINY)
    here = last(session.asking(method(embedder), InProcess(data, {"base": base}), base))
    assert found.sources == here.sources
    assert found.text == here.text
    assert found.asked == tuple(LIBRARIES)
    assert found.sources[0].cited == "[west/trees.md#Trees]"
    assert all(len(source.text.replace("…", " ").split()) <= 5 for source in found.sources)
    for _ in range(8):
        found = last(asked)
    assert "words_per_day" in " ".join(found.missing.values())


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> Iterator[Silos]:
    """Without limits."""
    one = Silos(tmp_path_factory.mktemp("free"), embedder)
    yield one
    one.stop()


def test_a_silo_is_killed_while_it_is_asked(free: Silos, embedder: str) -> None:
    """It has the question and answers no more. The others' passages make the answer, and it is named."""
    asked = free.session(method(embedder, deadline=4.0))
    assert last(asked).missing == {}
    west = free.processes["west"]
    west.send_signal(signal.SIGSTOP)  # so that it has the question, and is at it, when it is killed

    def kill() -> None:
        time.sleep(1.0)
        west.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    found = last(asked)
    thread.join()
    west.wait(30)
    assert set(found.missing) == {"west"}
    assert (found.done, found.found) == (True, True)
    assert {source.silo for source in found.sources} == {"north", "south"}
    free.start("west")
    while next(free.sockets.exchange(["west"], {"kind": "hello"}, b"", 5)).lost:
        time.sleep(0.1)
    again = last(asked)
    assert again.missing == {}
    assert again.sources[0].silo == "west"


def test_a_silo_that_sleeps_is_skipped_at_the_deadline(free: Silos, embedder: str) -> None:
    asked = free.session(method(embedder, deadline=2.0))
    free.processes["north"].send_signal(signal.SIGSTOP)
    try:
        found = last(asked)
    finally:
        free.processes["north"].send_signal(signal.SIGCONT)
    assert set(found.missing) == {"north"}
    assert {source.silo for source in found.sources} == {"south", "west"}


def test_from_the_shell(free: Silos, embedder: str, tmp_path: Path, fedtailor: Callable[..., Ended]) -> None:
    kit = tmp_path / "federation.toml"
    told = "".join(f'{silo} = "{path}"\n' for silo, path in free.sockets.paths.items())
    kit.write_text(f'engine = "sockets"\n[silos]\n{told}')
    sets = [f"method.embedder={embedder}", "method.floor=0.0", "method.words_share=0.9", "method.max_new_tokens=4"]
    more = [word for one in [*sets, "model.dtype=float32"] for word in ("--set", one)]
    done = fedtailor("ask", QUESTION, "--federation", kit, "--model", "tiny", *more)
    assert done.code == 0, done.err
    assert "[west/trees.md#Trees]" in done.out
    assert "asked: north, south, west" in done.err[-1]


def test_asking_leaves_no_file_at_a_silo(silos: Silos, embedder: str) -> None:
    """Nothing is remembered of a question but the ledger of limits."""
    assert not list((silos.folder / "north" / "silo").glob("memory/*"))
    assert (silos.folder / "north.index.asked").exists()
