"""An endpoint over real HTTP: down, slow, wrong, and in the end right."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from chat_server import serving
from fedtailor.answering import fresh
from fedtailor.data import Row
from fedtailor.endpoint import LARGEST, Endpoint, EndpointError, complete
from fedtailor.errors import UserError
from fedtailor.models import Resident


def said(messages: list[dict[str, str]]) -> str:
    return f"heard: {messages[-1]['content']}"


def asked(url: str, **more: object) -> tuple[str, list[float]]:
    waits: list[float] = []
    return complete(Endpoint(url, "m", **more), "hello", temperature=0.5, sleep=waits.append), waits  # type: ignore[arg-type]


def test_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    with serving(said) as server:
        assert asked(server.url, key_variable="SOME_KEY") == ("heard: hello", [])
        assert server.asked == [
            {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "max_tokens": 512}
        ]
        assert server.keys == ["Bearer s3cret"]
        assert asked(server.url + "/")[0] == "heard: hello"
        assert server.keys[1] is None


def test_a_model_behind_it(llama: Resident) -> None:
    def answers(messages: list[dict[str, str]]) -> str:
        return "So: " + fresh(llama).generate([Row("", "", messages=tuple(messages))], max_new_tokens=8)[0]

    with serving(answers) as server:
        assert asked(server.url)[0].startswith("So: ")


RUBBISH = [
    b"", b"<html>busy</html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"content": "  "}}]}', b"[" * 100_000, b"\xff\xfe", b"x" * (LARGEST + 1),
]  # fmt: skip


@pytest.mark.parametrize("body", RUBBISH, ids=lambda body: repr(body[:24]))
def test_rubbish_is_asked_for_again(body: bytes) -> None:
    with serving(said, (200, body)) as server:
        assert asked(server.url) == ("heard: hello", [1.0])
        assert len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again_with_back_off(status: int) -> None:
    with serving(said, (status, b"busy"), (status, b"busy")) as server:
        assert asked(server.url) == ("heard: hello", [1.0, 2.0])
    with (
        serving(said, *[(status, b"busy")] * 4) as server,
        pytest.raises(EndpointError, match=rf"4 tries, the last: HTTP {status}: busy"),
    ):
        asked(server.url, tries=4)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_callers_mistake_is_told_at_once(status: int) -> None:
    with serving(said, (status, json.dumps({"error": "wrong key"}).encode())) as server:
        with pytest.raises(EndpointError, match=f"HTTP {status}.*wrong key"):
            asked(server.url)
        assert len(server.asked) == 1


def test_a_server_that_is_down() -> None:
    with serving(said) as server:
        url = server.url
    waits: list[float] = []
    with pytest.raises(EndpointError, match="3 tries"):
        complete(Endpoint(url, "m"), "hello", temperature=0, sleep=waits.append)
    assert waits == [1.0, 2.0]


def test_a_server_that_drips() -> None:
    with serving(said, 20.0) as server:
        began = time.monotonic()
        assert asked(server.url, timeout=0.3)[0] == "heard: hello"
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("what", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_a_server_that_drips_without_an_end_is_left(what: bytes) -> None:
    """A byte every twentieth of a second, of a header that never ends or of a body of no length."""
    stopped = threading.Event()

    def drip(listening: socket.socket) -> None:
        link, _ = listening.accept()
        with link, contextlib.suppress(OSError):
            link.sendall(what)
            while not stopped.wait(0.05):
                link.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(EndpointError, match="1 tries, the last: the answer took too long"):
                asked(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.4, tries=1)
            assert time.monotonic() - began < 4
        finally:
            stopped.set()
            thread.join()


def test_an_address_that_is_none() -> None:
    with pytest.raises(EndpointError, match="1 tries, the last: Invalid port"):
        asked("http://127.0.0.1:notaport/v1", tries=1)


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        Endpoint("localhost:8000", "m")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(UserError, match="the environment has no NO_KEY"):
        Endpoint("http://localhost:8000", "m", "NO_KEY").check()
    Endpoint("http://localhost:8000", "m").check()
