"""A real server on 127.0.0.1 that speaks the chat completions protocol, a tiny model or a few lines behind it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`answers(messages)` is what it says; `replies` are sent first, one a request: (status, body) or seconds to wait."""

    daemon_threads = True

    def __init__(self, answers: Callable[[list[dict[str, str]]], str], replies: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.replies = answers, replies
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.pop(0) if self.server.replies else None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that waited long enough
            if self.path != "/v1/chat/completions":
                self._send(404, b"not here")
            elif isinstance(reply, int | float):
                self._drip(reply)
            elif reply is not None:
                self._send(*reply)
            else:
                message = {"role": "assistant", "content": self.server.answers(body["messages"])}
                self._send(200, json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, seconds: float) -> None:
        """A byte every twentieth of a second: no single read is slow."""
        self.send_response(200)
        self.end_headers()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *args: Any) -> None: ...


@contextlib.contextmanager
def serving(answers: Callable[[list[dict[str, str]]], str], *replies: Any) -> Iterator[Server]:
    server = Server(answers, list(replies))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
