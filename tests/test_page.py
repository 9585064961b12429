"""The page of questions against a real server on a free port: what it lets in, what it tells in which order, what ends it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from browser import PATIENCE
from fedtailor.errors import SiloError, UserError
from fedtailor.retrieval import page
from fedtailor.retrieval.answered import Answered, Source

HOSTILE = (
    "<script>fetch('http://evil.example')</script><img src=http://evil.example/x onerror=alert(1)> "
    "![x](http://evil.example/y) \x1b[31mred\u202edlrow"
)
SOURCES = (
    Source("north", "handbook.md", "Leave", "Parents may take 26 weeks of leave.", 0.91),
    Source("north", "handbook.md", "", HOSTILE + "w" * 300, 0.52),
    Source("south", "", "", "", 0.5),
)


class Answers:
    """An answerer: what `script` yields for a question. `ends`: how each of its generators ended, in order."""

    silos = ("north", "south", "west")

    def __init__(self, script: Callable[[str], Iterator[Answered]]) -> None:
        self.script = script
        self.asked: list[str] = []
        self.threads: set[int] = set()
        self.ends: list[str] = []
        self.ended = threading.Event()

    def ask(self, question: str) -> Iterator[Answered]:
        self.asked.append(question)
        self.threads.add(threading.get_ident())
        try:
            yield from self.script(question)
            self.ends.append("whole")
        except GeneratorExit:
            self.ends.append("stopped")
            raise
        except Exception:
            self.ends.append("failed")
            raise
        finally:
            self.ended.set()


def whole(question: str) -> Iterator[Answered]:
    yield Answered(question, "26 weeks.", SOURCES, done=True)


def endless(question: str) -> Iterator[Answered]:
    for count in itertools.count(1):
        yield Answered(question, "a" * count)
        time.sleep(0.01)


@contextlib.contextmanager
def serving(answers: Answers, title: str = page.TITLE) -> Iterator[str]:
    """The address that the page is served at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = page.application(answers, page.addresses("127.0.0.1", port), title)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextlib.contextmanager
def asking(address: str, question: str, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """What is told, as it comes."""
    with (
        httpx.Client(trust_env=False, timeout=PATIENCE) as client,
        client.stream("POST", f"{address}/ask", json={"question": question}, headers={"Origin": address, **headers}) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        yield map(json.loads, reply.iter_lines())


def told(address: str, question: str = "How long?") -> list[dict[str, Any]]:
    with asking(address, question) as lines:
        return list(lines)


def refused(address: str, **settings: Any) -> tuple[int, str]:
    sent = {"headers": {"Origin": address}, "json": {"question": "How long?"}} | settings
    reply = httpx.post(f"{address}/ask", trust_env=False, timeout=PATIENCE, **sent)
    return reply.status_code, reply.text


def test_a_source_is_cited_without_what_is_empty() -> None:
    assert [source.cited for source in SOURCES] == ["[north/handbook.md#Leave]", "[north/handbook.md]", "[south]"]
    assert Source("a", "", "B > C", "", 1).cited == "[a#B > C]"


def test_pieces_come_as_they_are_written_and_only_what_is_new() -> None:
    """Each piece is made once the one before it was read: none can have been kept back."""
    go = [threading.Event() for _ in range(4)]

    def script(question: str) -> Iterator[Answered]:
        known = [
            Answered(question, asked=("north", "south"), spared=("west",)),
            Answered(question, "", SOURCES[:1], ("north", "south"), ("west",), {"south": "no reply in 10 s"}),
            Answered(question, "26 ", SOURCES[:1], ("north", "south"), ("west",), {"south": "no reply in 10 s"}),
            Answered(question, "26 weeks", SOURCES[:1], ("north", "south"), ("west",), {"south": "no reply in 10 s"},
                     done=True, seconds={"retrieval": 0.4, "writing": 75.0}),
        ]  # fmt: skip
        for event, piece in zip(go, known, strict=True):
            assert event.wait(PATIENCE)
            yield piece

    with serving(Answers(script)) as address, asking(address, " How\nlong? ") as lines:
        assert next(lines) == {"question": "How long?"}
        got = []
        for event in go:
            event.set()
            got.append(next(lines))
        assert list(lines) == []
    card = {"cited": "[north/handbook.md#Leave]", "silo": "north", "document": "handbook.md", "section": "Leave",
            "text": "Parents may take 26 weeks of leave.", "score": 0.91, "told": "0.910"}  # fmt: skip
    assert got == [
        {"asked": ["north", "south"], "spared": ["west"]},
        {"sources": [card], "missing": {"south": "no reply in 10 s"}},
        {"more": "26 "},
        {"more": "weeks", "done": True, "seconds": {"retrieval": "0.4 s", "writing": "1.2 min"}},
    ]


def test_what_upsets_a_page_is_told_as_signs() -> None:
    def script(question: str) -> Iterator[Answered]:
        source = Source("no\u202eth", HOSTILE, "\x1b[2J", "\ud800", float("nan"))
        yield Answered(question, HOSTILE, (source,), missing={"a\x07": "b\u2066"}, seconds={"x": float("inf")}, done=True)

    with serving(Answers(script)) as address:
        _, last = told(address)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "".join(strings(last)))
    assert last["sources"][0]["text"] == "\N{REPLACEMENT CHARACTER}"
    assert last["sources"][0]["score"] == 0.0
    assert last["missing"] == {"a\N{REPLACEMENT CHARACTER}": "b\N{REPLACEMENT CHARACTER}"}
    assert last["sources"][0]["cited"].startswith("[no\N{REPLACEMENT CHARACTER}th/<script>"), "still as the text would cite it"


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    return [text for part in value for text in strings(part)] if isinstance(value, list) else [str(value)]


TEXTS = st.lists(st.text(max_size=5), max_size=6)


@given(TEXTS, st.integers(0, 3))
def test_changes_add_up_to_the_last_piece(texts: Sequence[str], sources: int) -> None:
    known: dict[str, Any] = {"text": ""}
    before = Answered("q")
    for number in range(len(texts)):
        after = Answered("q", "".join(texts[: number + 1]), SOURCES[:sources], done=number + 1 == len(texts))
        new = page.changes(before, after)
        assert "text" not in new, "a text that grows is told by what was added"
        known["text"] += new.pop("more", "")
        known, before = known | new, after
    assert known["text"] == page.clean("".join(texts))
    assert len(known.get("sources", [])) == (sources if texts else 0)
    assert page.changes(before, before) == {}


def test_a_text_that_was_written_anew_is_told_whole() -> None:
    assert page.changes(Answered("q", "a b"), Answered("q", "c")) == {"text": "c"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost:{port}.example"])
@pytest.mark.parametrize("path", ["/", "/page.js", "/ask"])
def test_a_name_pointed_here_is_refused(host: str, path: str) -> None:
    answers = Answers(whole)
    with serving(answers) as address:
        headers = {"Host": host.format(port=address.rpartition(":")[2]), "Origin": address}
        how = {"method": "POST", "json": {"question": "q"}} if path == "/ask" else {"method": "GET"}
        reply = httpx.request(url=address + path, headers=headers, trust_env=False, **how)
        assert reply.status_code == 421
        assert address.removeprefix("http://") in reply.text, "it says where the page is"
    assert answers.asked == []


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:1", "", "file://", None])
def test_a_question_from_another_site_is_refused(origin: str | None) -> None:
    answers = Answers(whole)
    with serving(answers) as address:
        status, text = refused(address, headers={} if origin is None else {"Origin": origin})
        preflight = httpx.options(f"{address}/ask", headers={"Origin": origin or "x", "Access-Control-Request-Method": "POST"},
                                  trust_env=False)  # fmt: skip
    assert (status, text) == (403, "questions are taken from the page itself only\n")
    assert preflight.status_code == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert answers.asked == []


def test_both_names_of_this_machine_are_the_page_and_it_may_not_be_framed_or_read() -> None:
    with serving(Answers(whole)) as address:
        port = address.rpartition(":")[2]
        reply = httpx.get(f"{address}/", headers={"Host": f"LocalHost:{port}"}, trust_env=False)
        headers = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        asked = httpx.post(f"{address}/ask", json={"question": "q"}, headers=headers, trust_env=False)
    assert reply.status_code == asked.status_code == 200
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "access-control-allow-origin" not in reply.headers
    assert {name: asked.headers[name] for name in page.HEADERS} == page.HEADERS


def test_addresses() -> None:
    assert page.addresses("127.0.0.1", 7860) == page.addresses("localhost", 7860) == {"127.0.0.1:7860", "localhost:7860"}
    assert page.addresses("::1", 7860) == {"[::1]:7860"}
    assert page.addresses("Rag.example", 80) == {"rag.example:80", "rag.example"}, "a browser leaves port 80 out"
    assert page.addresses("0.0.0.0", 7860, ["rag.example"]) == {"rag.example"}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"json": {"question": " \n"}}, "type a question first"),
        ({"json": {"question": "é" * 2001}}, "a question of 2,001 letters, 2,000 at most; say it shorter"),
        ({"content": b'{"question": "' + b"a" * 40_000}, "a question of more than 2,000 letters; say it shorter"),
        ({"content": b"[" * 30_000}, "no question came; load the page again"),
        ({"content": b'{"question": 5}'}, "no question came; load the page again"),
        ({"content": b"\xff"}, "no question came; load the page again"),
    ],
)
def test_what_is_no_question_is_refused(body: dict[str, Any], why: str) -> None:
    answers = Answers(whole)
    with serving(answers) as address:
        status, text = refused(address, **{"json": None, **body})
    assert (status, json.loads(text)) == (422, {"error": why})
    assert answers.asked == []


@given(st.text(alphabet=st.characters(), min_size=1, max_size=2000).filter(lambda text: text.split()))
def test_a_question_of_any_letters_fits_and_is_one_line(text: str) -> None:
    sent = json.dumps({"question": text}).encode()
    assert len(sent) <= page.LARGEST
    question = page._question(sent)
    assert question == " ".join(question.split())
    question.encode()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SiloError("no silo\x1b answered\nat all"), "no silo? answered?at all"),
        (ValueError("secret"), "something broke; the terminal that serves this page says what"),
        (None, "it ended before its answer was complete"),
    ],
)
def test_a_failure_is_one_line_and_the_next_question_is_answered(error: Exception | None, said: str) -> None:
    def script(question: str) -> Iterator[Answered]:
        yield Answered(question, "so far")
        if question == "fail":
            if error:
                raise error
            return
        yield Answered(question, "so far so good", done=True)

    with serving(Answers(script)) as address:
        assert told(address, "fail")[-1] == {"error": said}
        assert told(address, "again")[-1]["done"] is True


def test_names_and_titles_are_shown_as_text() -> None:
    answers = Answers(whole)
    answers.silos = ("north", "<b>\u202eeast")
    with serving(answers, "<i>Ask</i>") as address:
        html = httpx.get(f"{address}/", trust_env=False).text
    assert "<h1 dir=\"auto\">&lt;i&gt;Ask&lt;/i&gt;</h1>" in html
    assert "<bdi>north</bdi> and <bdi>&lt;b&gt;\N{REPLACEMENT CHARACTER}east</bdi>" in html


def test_serve_prints_its_address_and_ends_by_ctrl_c() -> None:
    code = "from fedtailor.retrieval import page; from test_page import *; page.serve(Answers(endless), port=0)"
    there = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": there}) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert found, (line, process.stderr.read())
        with asking(found[1], "first") as first, asking(found[1], "second") as second:
            assert "a" in [next(first), next(first)][1]["more"]
            assert [next(second), next(second)][1] == {"ahead": 1}
            process.send_signal(signal.SIGINT)
            over = {"error": "the page was closed where it is served"}
            assert (list(first)[-1], list(second)) == (over, [over])
        assert process.wait(PATIENCE) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_serve_says_why_it_cannot() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError) as error:
        page.serve(Answers(whole), port=taken.getsockname()[1])
    assert str(error.value).endswith("cannot listen there (Address already in use); name another host or port")
    with pytest.raises(UserError, match="is every address of this machine; name the one"):
        page.serve(Answers(whole), host="0.0.0.0")
    with pytest.raises(UserError, match=re.escape("127.0.0.1:70000: cannot listen there")):
        page.serve(Answers(whole), port=70_000)


@pytest.mark.parametrize("gone", ["starlette.applications", "uvicorn"])
def test_without_the_extra_it_says_so(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(UserError, match=re.escape("pip install 'fedtailor[web]'")):
        page.serve(Answers(whole), port=0)
