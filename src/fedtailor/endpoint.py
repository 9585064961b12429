"""An OpenAI-compatible endpoint as a writer of prompts. It is told public text alone, and may fail: then it is skipped.

Asked with back-off: a refused connection, a slow answer, a 429 or 5xx and an answer that is no chat completion are
tried again after 1, 2, 4, ... seconds; a 4xx is the caller's mistake, and is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from fedtailor.errors import FedtailorError, UserError, printable

LARGEST = 1 << 20  # bytes of an answer; a longer one is no list of prompts
FIRST_WAIT = 1.0  # seconds before the second try


class EndpointError(FedtailorError):
    """It gave nothing that could be used, however often it was asked."""


@dataclass(frozen=True)
class Endpoint:
    """The [method.endpoint] part. Lives with the server: no silo is told of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    url: str  # up to and with the version, such as http://127.0.0.1:8000/v1
    model: str  # as the endpoint calls it
    key_variable: str = ""  # the environment variable that holds its key: a key in a file would be passed on with it
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds, for one whole answer
    tries: Annotated[int, Field(ge=1)] = 3
    max_tokens: Annotated[int, Field(ge=1)] = 512

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must begin with http:// or https://")

    def check(self) -> None:
        """Raises UserError where the key is missing: a run needs it, a look at a finished run does not."""
        if self.key_variable and not os.environ.get(self.key_variable):
            raise UserError(
                f"[method] endpoint.key_variable: the environment has no {self.key_variable}; export it, or leave it out"
            )


def complete(endpoint: Endpoint, text: str, *, temperature: float, sleep: Callable[[float], Any] = time.sleep) -> str:
    """The answer to one user message. Raises EndpointError."""
    why = ""
    for number in range(endpoint.tries):
        if number:
            sleep(FIRST_WAIT * 2 ** (number - 1))
        try:
            return _asked(endpoint, text, temperature)
        except _Final as error:
            raise EndpointError(f"{endpoint.url}: {printable(error)}") from error
        except (_Again, OSError, ValueError) as error:
            why = printable(error) or type(error).__name__
    raise EndpointError(f"{endpoint.url}: {endpoint.tries} tries, the last: {why}")


class _Again(Exception):
    """Worth another try."""


class _Final(Exception):
    """Not worth one."""


def _asked(endpoint: Endpoint, text: str, temperature: float) -> str:
    import httpx

    headers = {"Authorization": f"Bearer {os.environ.get(endpoint.key_variable, '')}"} if endpoint.key_variable else {}
    body = {
        "model": endpoint.model, "messages": [{"role": "user", "content": text}], "temperature": temperature,
        "max_tokens": endpoint.max_tokens,
    }  # fmt: skip
    address, deadline = f"{endpoint.url.rstrip('/')}/chat/completions", _Deadline(endpoint.timeout)
    try:
        # what runs on this machine is not reached by the environment's proxy
        proxied = httpx.URL(address).host not in ("127.0.0.1", "localhost", "::1")
        with (
            deadline,
            httpx.Client(timeout=endpoint.timeout, trust_env=proxied) as client,
            client.stream("POST", address, json=body, headers=headers, extensions={"trace": deadline.seen}) as response,
        ):
            whole = b"".join(_within(response.iter_bytes()))
            status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        told = "the answer took too long" if deadline.over else str(error) or type(error).__name__
        raise _Again(told) from error
    if deadline.over:  # an answer without a length ends where its connection does
        raise _Again("the answer took too long")
    if status >= 400:
        told = f"HTTP {status}: {whole[:200].decode(errors='replace')}"
        raise _Final(told) if status < 500 and status not in (408, 409, 425, 429) else _Again(told)
    try:
        found = json.loads(whole)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _Again(f"no chat completion: {whole[:100].decode(errors='replace')!r}") from error
    if not isinstance(found, str) or not found.strip():
        raise _Again("an empty answer")
    return found


class _Deadline:
    """Of one whole exchange: a server that drips a byte at a time, of its headers too, keeps every single read within its
    timeout. When the time is up, the connections are shut down, and whoever reads from them is told."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._links: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def seen(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx's trace: of each connection that is made, the socket."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._links.append(info["return_value"].get_extra_info("socket"))
            if self.over:
                self._end()

    def _end(self) -> None:
        self.over = True
        for link in self._links:
            with contextlib.suppress(OSError):  # it has ended by itself
                link.shutdown(socket.SHUT_RDWR)


def _within(pieces: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > LARGEST:
            raise _Again(f"an answer of over {LARGEST} bytes")
        yield piece
