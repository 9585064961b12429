"""A silo's process: a request is applied once, whatever dies; nothing but in_silo work runs; the server learns no row."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import __version__, experiment, models, wire
from fedtailor.core import Silo, in_silo
from fedtailor.engines.courier import Sockets
from fedtailor.engines.site import Site
from fedtailor.engines.worker import OPEN, Open, Opened, Worker
from fedtailor.errors import SiloError, UserError
from fedtailor.packed import LARGE, Spooled, digest
from fedtailor.privacy import noise
from fedtailor.prompts import Prompt
from fedtailor.retrieval.policy import Policy
from fedtailor.trying import Try, attempt
from libraries import indexes

wire.allow(__name__)
TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


@dataclass(frozen=True)
class Add:
    amount: int
    fail: str = ""


@dataclass(frozen=True)
class Sum:
    total: int
    seen: torch.Tensor


@in_silo
def add(silo: Silo, body: Add) -> Sum:
    silo.memory["n"] = silo.memory.get("n", 0) + body.amount
    if body.fail == "silo":
        raise SiloError("no rows today")
    if body.fail == "memory":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ...")
    if body.fail == "bug":
        raise KeyError(silo.data.train[0].prompt)
    return Sum(silo.memory["n"], torch.tensor([float(silo.memory["n"])]))


@in_silo
def doubled(silo: Silo, body: Sum) -> Sum:
    silo.memory["n"] = silo.memory.get("n", 0) + 1
    return Sum(silo.memory["n"], body.seen * 2)


def not_marked(silo: Silo, body: Add) -> Sum:
    raise AssertionError("this must never run")


def opening(run: str = "run", **more: Any) -> Open:
    asked = experiment.load(TINY)
    return Open(run, 0, asked.data, asked.model, **more)


def opened(folder: Path, run: str = "run") -> Worker:
    worker = Worker(Site("cafe", folder, server_names_data=True))
    folder.mkdir(exist_ok=True)
    head, body = worker.handle({"kind": "open"}, wire.pack(opening(run)))
    found = wire.unpack(body)
    assert isinstance(found, Opened)
    told = {"kind": "opened", "model_sha256": found.model_sha256, "fedtailor": __version__, "torch": torch.__version__}
    assert head == told
    return worker


def ask(worker: Worker, amount: int, number: int = 1, index: int = 0, committed: int = 0, **more: Any) -> Any:
    head = {"kind": "ask", "run": "run", "round": number, "index": index, "work": wire.address(add), "committed": committed}
    head |= {key: value for key, value in more.items() if key in head}
    answer, body = worker.handle(head, wire.pack(Add(amount, more.get("fail", ""))))
    return wire.unpack(body) if answer["kind"] == "reply" else answer


def test_a_repeated_request_is_applied_once_even_by_a_worker_that_came_back(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert ask(first, 5).total == 5
    assert ask(first, 5).total == 5
    again = opened(tmp_path)  # killed, and started anew: all it knows is what is on the disk
    assert ask(again, 5).total == 5
    assert ask(again, 2, index=1).total == 7
    assert ask(opened(tmp_path), 1, number=2, committed=1).total == 8


def test_an_open_round_that_the_server_never_committed_is_undone(tmp_path: Path) -> None:
    worker = opened(tmp_path)
    assert ask(worker, 5, number=1, committed=0).total == 5
    assert ask(worker, 7, number=1, committed=0).total == 7, "the server came back, and asks round 1 otherwise"
    assert ask(opened(tmp_path), 1, number=2, committed=0).total == 1, "round 2 begins where round 0 ended"


def test_a_late_copy_of_an_old_request_undoes_nothing(tmp_path: Path) -> None:
    worker = opened(tmp_path)
    ask(worker, 5, number=1)
    ask(worker, 5, number=2, committed=1)
    assert ask(worker, 5, number=1)["why"] == "a request of round 1 came late: this silo is at round 2"
    assert ask(worker, 1, number=3, committed=2).total == 11


def test_runs_do_not_share_memory(tmp_path: Path) -> None:
    ask(opened(tmp_path), 5)
    other = opened(tmp_path, "another")
    assert ask(other, 1, run="another").total == 1
    assert ask(other, 1, run="run") == {"kind": "unknown"}, "to be opened again"


def test_a_silo_that_fails_says_so_and_remembers_nothing(tmp_path: Path) -> None:
    worker = opened(tmp_path)
    assert ask(worker, 5, fail="silo") == wire.Failure("no rows today")
    assert ask(worker, 1, index=1).total == 1


def test_a_bug_is_told_without_the_row_that_is_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = opened(tmp_path)
    row = worker.desks["run"].data.train[0].prompt
    with caplog.at_level(logging.ERROR, "fedtailor.silo"):
        answer = ask(worker, 5, fail="bug")
    assert answer == {"kind": "refused", "why": "unexpected KeyError: its own log says where"}
    assert repr(row)[:20] in caplog.text, "the silo itself sees it all"
    assert ask(worker, 1) == {"kind": "unknown"}, "it begins again from what is on the disk"


def test_a_machine_without_memory_is_told_in_two_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = opened(tmp_path)
    with caplog.at_level(logging.ERROR, "fedtailor.silo"):
        assert ask(worker, 5, fail="memory") == {"kind": "refused", "why": "out of memory"}
    assert "give this machine more, or ask for smaller batches" in caplog.text


def test_a_large_reply_lies_in_a_file_and_is_repeated_from_there(tmp_path: Path) -> None:
    def ask_twice(worker: Worker, number: int) -> tuple[dict[str, Any], Any]:
        head = {"kind": "ask", "run": "run", "round": number, "index": 0, "work": wire.address(doubled), "committed": number - 1}
        return worker.handle(head, sent)

    sent = wire.spooled(Sum(0, torch.arange(LARGE // 4, dtype=torch.float32)), tmp_path / "spool")
    head, reply = ask_twice(opened(tmp_path), 1)
    assert isinstance(reply, Spooled)
    assert torch.equal(wire.unpack(reply).seen, 2 * torch.arange(LARGE // 4, dtype=torch.float32))
    worker = opened(tmp_path)  # killed, and started anew
    again, repeated = ask_twice(worker, 1)
    assert again == head
    assert digest(repeated) == digest(reply)
    assert ask_twice(worker, 2)[1] is not None
    files = [file.name for file in (tmp_path / "memory").rglob("*") if file.is_file()]
    assert len(files) == 2, f"the first reply is swept away: {files}"
    assert wire.unpack(ask_twice(opened(tmp_path), 2)[1]).total == 2


def test_documents_may_change_in_the_middle_of_a_run(tmp_path: Path, embedder: str) -> None:
    """They are no rows: an index is added to while it is asked."""
    made = indexes(tmp_path / "indexes", embedder)["north"]
    documents = Policy(index=str(made))

    def begun() -> Worker:
        (tmp_path / "silo").mkdir(exist_ok=True)
        worker = Worker(Site("cafe", tmp_path / "silo", server_names_data=True, documents=documents))
        assert worker.handle({"kind": "open"}, wire.pack(opening()))[0]["kind"] == "opened"
        return worker

    worker = begun()
    ask(worker, 5)
    corpus = worker.desks["run"].data.corpus
    before = corpus.sha256()
    corpus.index().put("new.md", "s", *corpus.index().document("fish.txt"), "now")
    assert corpus.sha256() != before
    assert ask(begun(), 5, number=2, committed=1)


def test_rows_that_changed_in_the_middle_of_a_run_are_refused(tmp_path: Path) -> None:
    worker = opened(tmp_path)
    ask(worker, 5)
    rows = worker.desks["run"].data
    worker.site = replace(worker.site, data={"max_train": len(rows.train) - 1})
    answer, _ = worker.handle({"kind": "open"}, wire.pack(opening()))
    assert answer["why"] == "the rows here changed since this run began; bring them back, or begin a new run"
    assert worker.handle({"kind": "open"}, wire.pack(opening("new")))[0]["kind"] == "opened"
    ask(worker, 5, number=2, committed=1)  # the run goes on with the rows that it has
    again = opened(tmp_path)  # and after a restart those are still the ones that it must find
    assert ask(again, 1, number=3, committed=2).total == 11


def test_another_minor_version_of_a_library_is_refused(tmp_path: Path) -> None:
    mine = models.versions()
    worker = Worker(Site("cafe", tmp_path, server_names_data=True))
    other = wire.pack(opening(libraries=mine | {"peft": "0.1.0"}))
    why = f"peft {mine['peft']} is installed here, the server has 0.1.0: install the same"
    assert worker.handle({"kind": "open"}, other)[0]["why"] == why
    patch = wire.pack(opening(libraries=mine | {"peft": ".".join(mine["peft"].split(".")[:2]) + ".99"}))
    assert worker.handle({"kind": "open"}, patch)[0]["kind"] == "opened"


def test_runs_of_long_ago_are_forgotten_and_few_are_held(tmp_path: Path) -> None:
    worker = opened(tmp_path, "old")
    for number in range(OPEN + 2):
        worker.handle({"kind": "open"}, wire.pack(opening(f"run {number}")))
    assert list(worker.desks) == [f"run {number}" for number in range(2, OPEN + 2)]
    ask(opened(tmp_path, "run"), 1)
    (kept,) = (tmp_path / "memory").glob("*.safetensors")
    os.utime(kept, (0, time.time() - 86400 * 91))
    worker._forget()
    assert list((tmp_path / "memory").iterdir()) == []


@pytest.mark.parametrize("work", [f"{__name__}:not_marked", "os:system", "fedtailor.wire:pack", "no-colon", f"{__name__}:Add.x"])
def test_only_in_silo_work_runs(tmp_path: Path, work: str) -> None:
    answer = ask(opened(tmp_path), 1, work=work)
    assert answer["kind"] == "refused"
    assert work in answer["why"]


def test_what_nobody_waits_for_any_more_is_not_done(tmp_path: Path) -> None:
    worker = Worker(Site("cafe", tmp_path / "silo", server_names_data=True))
    up, began = threading.Event(), time.monotonic()
    threading.Thread(target=worker.serve, args=(up.set,), daemon=True).start()
    assert up.wait(10)
    sockets = Sockets({"cafe": worker.address})
    (answer,) = sockets.exchange(("cafe",), {"kind": "open"}, wire.pack(opening()), 60)
    assert answer.head["kind"] == "opened"
    head = {"kind": "ask", "run": "run", "index": 0, "work": wire.address(add), "committed": 0}
    with worker.lock:  # busy, while three rounds are given up
        for number in (1, 2, 3):
            (answer,) = sockets.exchange(("cafe",), {**head, "round": number}, wire.pack(Add(1)), 0.2)
            assert answer.lost == "no reply within 0.2 s"
    (answer,) = sockets.exchange(("cafe",), {**head, "round": 4, "committed": 3}, wire.pack(Add(1)), 30)
    assert wire.unpack(answer.body).total == 1, "none of the three was applied"
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "changed",
    [
        {"round": "1"}, {"round": True}, {"run": 3}, {"index": None}, {"committed": 1.5},
        {"index": -5}, {"index": 10**10}, {"round": -1}, {"committed": -2},
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    answer = ask(opened(tmp_path), 1, **changed)
    assert answer["kind"] == "refused"
    assert next(iter(changed)) in answer["why"]


def test_what_opens_nothing_is_refused(tmp_path: Path) -> None:
    worker = Worker(Site("cafe", tmp_path, server_names_data=True))
    for body in (wire.pack(Add(1)), b"half a mess"):
        assert worker.handle({"kind": "open"}, body)[0]["kind"] == "refused"
    other = wire.pack(opening(fedtailor="0.0.1"))
    assert "the server has 0.0.1: install the same" in worker.handle({"kind": "open"}, other)[0]["why"]
    assert worker.handle({"kind": "shut down"}, b"")[0]["why"] == "no message of kind 'shut down' is known here"


def test_a_misfit_of_rows_is_told_to_the_silo_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Site("cafe", tmp_path, {"template": "{secret_column}"}, server_names_data=True))
    with caplog.at_level(logging.ERROR, "fedtailor.silo"):
        answer, _ = worker.handle({"kind": "open"}, wire.pack(opening()))
    assert answer == {"kind": "refused", "why": "its own log says why"}
    assert "has no column 'secret_column'" in caplog.text


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = opened(tmp_path)
    ask(worker, 5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(wire, "write_file", full)
        assert ask(worker, 1, number=2, committed=1)["kind"] == "refused"
    worker = opened(tmp_path)
    assert ask(worker, 1, number=2, committed=1).total == 6


def test_its_socket_is_its_owners_alone(tmp_path: Path) -> None:
    worker = Worker(Site("cafe", tmp_path / "silo"))
    up = threading.Event()
    threading.Thread(target=worker.serve, args=(up.set,), daemon=True).start()
    assert up.wait(10)
    assert stat.S_IMODE(os.stat(worker.address).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(worker.site.folder).st_mode) == 0o700
    with pytest.raises(UserError, match="another worker runs there; end it, or give this one its own folder"):
        Worker(worker.site).serve()
    sockets = Sockets({"cafe": worker.address, "gone": tmp_path / "none.sock"})
    answers = {answer.silo: answer for answer in sockets.exchange(("cafe", "gone"), {"kind": "hello"}, b"", 5)}
    assert answers["cafe"].head["silo"] == "cafe"
    assert answers["gone"].lost.startswith("its worker cannot be reached: ")
    with worker.lock:  # busy with another request
        began = time.monotonic()
        (late,) = sockets.exchange(("cafe",), {"kind": "ask"}, b"", 0.3)
    assert late.lost == "no reply within 0.3 s"
    assert time.monotonic() - began < 3


def test_what_a_silo_has_spent_outlives_it_and_no_server_takes_it_back(tmp_path: Path) -> None:
    """Another prompt at the same place of the same round, again and again, before and after a restart."""

    def tried(worker: Worker, number: int) -> Any:
        body = Try((Prompt(f"{number} {{input}}"),), ((0, 9),), 7, noise=noise("laplace", 2.0, 1e-5, 2))
        head = {"kind": "ask", "run": "run", "round": 1, "index": 0, "work": wire.address(attempt), "committed": 0}
        return wire.unpack(worker.handle(head, wire.pack(body))[1])

    worker = opened(tmp_path)
    assert tried(worker, 1).epsilon == 1.0
    assert tried(worker, 2).epsilon == 2.0
    same = tried(opened(tmp_path), 2)
    assert same.epsilon == 2.0
    assert torch.equal(same.sums, tried(worker, 2).sums), "the same request is answered from what is kept, and costs nothing"
    for again in (worker, opened(tmp_path)):
        assert "it would spend epsilon = 3 of some row, more than 2" in tried(again, 3).error
