"""The two ends, over a real federation, where the other side's process runs other code, which its owner put there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from background import wait_for
from fedtailor.engines.nvflare import NVFlare
from flares import SILOS, Federation, all_answer, hello, names_one_alone, submitted

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

@contextlib.contextmanager
def changed(federation: Federation, flare: NVFlare, who: str, code: str, folder: Path) -> Iterator[None]:
    """This participant's own process runs other code, which its owner put there."""
    (folder / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    federation.stop(who)
    federation.start(who, PYTHONPATH=path)
    try:
        yield
    finally:
        federation.stop(who)
        federation.start(who)
        assert all_answer(flare)


FALSE_SERVER = """
import pathlib, sys
if "nvflare.private.fed.app.server.runner_process" in pathlib.Path("/proc/self/cmdline").read_text().split(chr(0)):
    from nvflare.collab import collab
    from fedtailor.engines import nvflare_ends as ends

    honest, hello = ends.ServerEnd.run, ends.tohex({"kind": "hello"})
    CALLS = {
        "a chunk out of place": ("put", "../../x", 5, b"abc"),
        "a chunk before the first": ("put", "../../x", -1, b"abc"),
        "a number for a chunk": ("put", "../../x", 0, 10**11),
        "a reply that is not there": ("get", "../../../../etc/passwd", 0),
        "no hex": ("ask", "1", "zz", 5.0, b""),
        "a list": ("ask", "1", ends.tohex([1]), 5.0, b""),
        "a number for a body": ("ask", "1", hello, 5.0, 10**11),
        "what is not published": ("from_server",),
    }

    @collab.main
    def run(self):
        with open(sys.argv[sys.argv.index("-m") + 1] + "/false.txt", "w") as out:
            for one in collab.clients:
                for what, (call, *given) in CALLS.items():
                    try:
                        got = getattr(one(timeout=10), call)(*given)
                        said = ends.unhex(got[0]) if isinstance(got, tuple | list) else {}
                        text = said.get("lost") or said.get("head", {}).get("why", "done")
                    except Exception as error:
                        text = str(error)
                    print(one.name, what, text.replace(chr(10), " "), sep=": ", file=out, flush=True)
            print("end", file=out)
        honest(self)

    ends.ServerEnd.run = run
"""


def test_a_server_that_lies_gets_nothing_of_a_silo(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """Its owner has loosened its own rules, too: each silo refuses a job with code by its own."""
    kit, there = federation.kits["server"], tmp_path / "was-here"
    rules, told = kit / "local" / "authorization.json", kit / "false.txt"
    strict = rules.read_text()
    rules.write_text(strict.replace('"byoc": "none"', '"byoc": "any"'))
    try:
        with changed(federation, flare, "server", FALSE_SERVER, tmp_path):
            assert all_answer(flare)  # after all those calls, a silo still answers
            found = submitted(kit, tmp_path / "job", with_code(there))
            rules.write_text(strict)
    finally:
        rules.write_text(strict)
    assert found["status"] == "FINISHED:FAILED_TO_RUN"
    assert refusing(found) == set(SILOS)
    assert not there.exists()
    lines = told.read_text().splitlines()
    assert lines.pop() == "end"
    assert len(lines) == 8 * len(SILOS)
    assert [line for line in lines if line.endswith(": done")] == []
    for what, why in {
        "a chunk out of place": "chunk at 5 of a request that is not here up to there",
        "a number for a chunk": "has no len()",
        "a reply that is not there": "that reply is not here any more",
        "a number for a body": "its body is a int",
        "a list": "a message's head is no JSON object",
    }.items():
        assert len([line for line in lines if f": {what}: " in line and why in line]) == len(SILOS), (what, lines)


def test_a_job_that_carries_code_is_refused_by_the_server(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    found = submitted(federation.kits["server"], tmp_path / "job", with_code(tmp_path / "was-here"))
    assert found["status"] == "FINISHED:FAILED_TO_RUN"
    assert refusing(found) == {"server"}
    assert not (tmp_path / "was-here").exists()


def with_code(there: Path) -> Callable[[Path], None]:
    def change(job: Path) -> None:
        (job / "app" / "custom").mkdir()
        (job / "app" / "custom" / "sitecustomize.py").write_text(f"open({str(there)!r}, 'w')")

    return change


def refusing(found: dict[str, Any]) -> set[str]:
    return {line.partition(":")[0] for line in found["job_deploy_detail"] if "BYOC not permitted" in line}


CHANGED = """
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
            for _ in range(3):
                time.sleep(1)
                for other in collab.other_clients:
                    head = ends.tohex({"kind": "hello"})
                    for call, given in (("ask", ("1", head, 5.0, b"")), ("get", ("1", 0)), ("put", ("1", 0, b""))):
                        try:
                            print(call, "got", getattr(other(timeout=5), call)(*given), file=out, flush=True)
                        except Exception as error:
                            print(call, error, file=out, flush=True)
        threading.Thread(target=ask, daemon=True).start()

    honest, hello, big = ends.SiloEnd.ask, {"kind": "hello", "silo": "clinic"}, 20 * 1024**2
    LIES = {
        "10 GB": (ends.tohex({"head": hello, "size": 10**10}), b""),
        "less than nothing": (ends.tohex({"head": hello, "size": -1}), b""),
        "no number": (ends.tohex({"head": hello, "size": True}), b"a"),
        "less than announced": (ends.tohex({"head": hello, "size": 5}), b"abc"),
        "a number for a body": (ends.tohex({"head": hello, "size": 5}), 5),
        "a number for a chunk": (ends.tohex({"head": hello, "size": big}), b""),
        "a list": (ends.tohex([1]), b""),
        "no hex": ("zz", b""),
        "a long head": (ends.tohex({"head": {"why": "a" * 10**6}}), b""),
        "a deep head": (ends.tohex({"head": {"why": [[[]]]}}), b""),
        "a deeper head": ((b"[" * 30000).hex(), b""),
        "not a pair": 1,
        "another's name": (ends.tohex({"head": hello, "silo": "shop", "size": 0}), b""),
        "another exchange": (ends.tohex({"head": hello, "id": "0", "kind": "job"}), b""),
        "a terminal's orders": (ends.tohex({"head": {"why": "\\x1b[2J\\ud800"}}), b""),
    }

    @collab.publish
    def ask(self, key, head, seconds, body):
        lie = ends.unhex(head).get("lie")
        return LIES[lie] if lie in LIES else honest(self, key, head, seconds, body)

    @collab.publish
    def get(self, key, offset):
        return 10**11

    ends.SiloEnd.start, ends.SiloEnd.ask, ends.SiloEnd.get = start, ask, get
"""


@pytest.fixture(scope="module")
def false_clinic(flare: NVFlare, federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns where it writes what it got of the others. That it came back makes it a member of a new job."""
    with changed(federation, flare, "clinic", CHANGED, tmp_path_factory.mktemp("clinic")):
        told = federation.kits["clinic"] / "curious.txt"
        assert wait_for(lambda: not [a for a in hello(flare) if a.lost] and told.exists(), 90)
        yield told


def test_a_silo_that_asks_another_is_refused(false_clinic: Path) -> None:
    assert wait_for(lambda: false_clinic.read_text().count("\n") >= 18, 30)
    lines = false_clinic.read_text().splitlines()
    assert [line for line in lines if " got " in line] == []
    for call in ("ask", "get", "put"):
        assert [line for line in lines if line.startswith(call) and "clinic is not the server" in line]


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ("10 GB", "it announced a reply of 10000000000 bytes"),
        ("less than nothing", "it announced a reply of -1 bytes"),
        ("no number", "it announced a reply of True bytes"),
        ("less than announced", "its body is 3 bytes, 5 announced"),
        ("a number for a body", "its body is a int"),
        ("a number for a chunk", "its body is a int"),
        ("a list", "no JSON object"),
        ("no hex", "non-hexadecimal"),
        ("a long head", "over the limit of 65536"),
        ("a deep head", "its head is no flat table"),
        ("a deeper head", "recursion"),
        ("not a pair", "its courier failed"),
    ],
)
def test_an_end_that_lies_is_named_and_disturbs_no_other(lie: str, told: str, flare: NVFlare, false_clinic: Path) -> None:
    names_one_alone(flare, lie, "clinic", told)


@pytest.mark.parametrize("lie", ["another's name", "another exchange"])
def test_a_silo_answers_for_itself_alone(lie: str, flare: NVFlare, false_clinic: Path) -> None:
    answers = list(flare.exchange(SILOS, {"kind": "hello", "lie": lie}, b"", 30))
    assert sorted((one.silo, one.head["silo"], one.lost) for one in answers) == [(silo, silo, "") for silo in SILOS]


def test_a_silos_words_give_a_terminal_no_orders(flare: NVFlare, false_clinic: Path) -> None:
    (answer,) = flare.exchange(["clinic"], {"kind": "hello", "lie": "a terminal's orders"}, b"", 30)
    assert answer.head == {"why": "?[2J?"}
