"""The page of `fedtailor ask --web`: a question, its answer while it is written, and where it comes from, per silo.

Whoever reaches the address may ask, so no other site may: a request is served under the page's own addresses alone (Host: no
foreign name can be pointed here), and a question is taken from the page itself alone (Origin). The page loads nothing from
elsewhere, and its policy makes the browser hold that line. What silos let out is shown as plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtailor.errors import FedtailorError, UserError, printable
from fedtailor.figures import clean, duration, is_number, number
from fedtailor.retrieval.answered import Answered, Answerer, Source
from fedtailor.retrieval.turns import Turns

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST = 2_000  # letters of a question
LARGEST = 32_768  # bytes of a request: that many letters, each escaped
TITLE = "Ask the silos"
ANYWHERE = ("", "0.0.0.0", "::")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store, no-transform",
}


def serve(
    answerer: Answerer, host: str = "127.0.0.1", port: int = 7860, title: str = TITLE, names: Collection[str] = ()
) -> None:
    """Serves the page until Ctrl-C; prints its address. Port 0: a free one. `names`: further "name:port" that the page is
    opened under, such as a proxy's, or "name" for a proxy's https. Raises UserError where it cannot listen there."""
    if host in ANYWHERE and not names:
        raise UserError(f"host {host!r} is every address of this machine; name the one that the page is to be opened under")
    try:
        import uvicorn
    except ImportError:
        raise _without_extra() from None
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        errno = getattr(error, "errno", None) or 0  # of a name that is not known: below 0
        why = os.strerror(errno) if errno > 0 else getattr(error, "strerror", error)
        raise UserError(f"{host}:{port}: cannot listen there ({why}); name another host or port") from error
    with listening:
        port = listening.getsockname()[1]
        app = application(answerer, addresses(host, port, names), title)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(where + (f", opened as {', '.join(sorted(names))}" if names else "") + " (Ctrl-C ends it)", flush=True)
        if not host.startswith("127.") and host not in ("localhost", "::1"):
            print("whoever reaches this address may ask: it has no login", flush=True)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=1
        )

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.state.turns.stop()  # it waits for answers that are being written
                await super().shutdown(sockets)

        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run(sockets=[listening])


def addresses(host: str, port: int, names: Collection[str] = ()) -> frozenset[str]:
    """What a request may name as its Host: the address served under, and `names`. This machine's own has two spellings."""
    local = ("127.0.0.1", "localhost")
    hosts = () if host in ANYWHERE else local if host in local else (f"[{host}]" if ":" in host else host,)
    own = {f"{name}:{port}" for name in hosts} | (set(hosts) if port == 80 else set())
    return frozenset(name.lower() for name in (*own, *names))


def application(answerer: Answerer, hosts: Collection[str], title: str = TITLE) -> Starlette:
    """The page, not yet served. `hosts`: as `addresses` gives them. Raises UserError without the extra."""
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError:
        raise _without_extra() from None
    turns = Turns(answerer)
    files = {"/": ("html", _page(answerer, title)), "/page.css": ("css", _file("page.css")),
             "/page.js": ("javascript", _file("page.js"))}  # fmt: skip

    async def file(request: Request) -> Response:
        kind, text = files[request.url.path]
        return Response(text.encode("utf-8", "replace"), media_type=f"text/{kind}")

    async def ask(request: Request) -> ASGIApp:
        try:
            question = _question(await _body(request))
        except UserError as error:
            return Response(json.dumps({"error": str(error)}), 422, media_type="application/json")
        return _Stream(turns, question)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        turns.stop()

    routes = [*(Route(path, file) for path in files), Route("/ask", ask, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(_Guard, hosts=hosts)], lifespan=lifespan)
    app.state.turns = turns
    return app


class _Guard:
    """Lets requests pass that are the page's own; adds HEADERS to every response."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, hosts
        self.origins = {f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, app = Headers(scope=scope), self.app
        named = headers.getlist("host")
        if len(named) != 1 or named[0].lower() not in self.hosts:
            app = PlainTextResponse(f"this page is at {', '.join(sorted(self.hosts))} only\n", 421)
        elif scope["method"] not in ("GET", "HEAD") and headers.get("origin", "").lower() not in self.origins:
            app = PlainTextResponse("questions are taken from the page itself only\n", 403)
        await app(scope, receive, headed)


class _Stream:
    """The answer: a line of JSON for each thing that is new. A browser that leaves ends it."""

    def __init__(self, turns: Turns, question: str) -> None:
        self.turns, self.question = turns, question

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def leaving() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        writing, left = asyncio.create_task(self._write(send)), asyncio.create_task(leaving())
        try:
            await asyncio.wait([writing, left], return_when=asyncio.FIRST_COMPLETED)
        finally:
            writing.cancel()
            left.cancel()
            await asyncio.gather(writing, left, return_exceptions=True)
        if not writing.cancelled():
            writing.result()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]  # nginx: do not gather
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._told()) as lines:
            async for line in lines:
                body = json.dumps(line).encode() + b"\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _told(self) -> AsyncGenerator[dict[str, Any], None]:
        before = Answered(self.question)
        yield {"question": before.question}
        try:
            async with aclosing(self.turns.ask(self.question)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Answered):
                        yield changes(before, piece)
                        before = piece
                    else:
                        yield {"ahead": piece}
            if not before.done:
                yield {"error": "it ended before its answer was complete"}
        except FedtailorError as error:
            yield {"error": clean(printable(error))}
        except Exception:
            logging.getLogger(__name__).exception("a question was not answered")
            yield {"error": "something broke; the terminal that serves this page says what"}


def changes(before: Answered, after: Answered) -> dict[str, Any]:
    """What is new, ready to be shown; of a text that grew, what was added to it, as "more"."""
    old, new = _shown(before), _shown(after)
    told = {key: value for key, value in new.items() if value != old[key]}
    if "text" in told and new["text"].startswith(old["text"]):
        told["more"] = told.pop("text")[len(old["text"]) :]
    return told


def _shown(known: Answered) -> dict[str, Any]:
    return {
        "text": clean(known.text), "sources": [_card(source) for source in known.sources],
        "asked": [clean(silo) for silo in known.asked], "spared": [clean(silo) for silo in known.spared],
        "missing": {clean(silo): clean(why) for silo, why in known.missing.items()}, "found": known.found, "done": known.done,
        "seconds": {clean(what): duration(seconds) for what, seconds in known.seconds.items()},
    }  # fmt: skip


def _card(source: Source) -> dict[str, Any]:
    score = min(max(float(source.score), 0.0), 1.0) if is_number(source.score) else 0.0
    parts = {part: clean(getattr(source, part)) for part in ("cited", "silo", "document", "section", "text")}
    return {**parts, "score": score, "told": number(source.score)}


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise UserError(f"a question of more than {MOST:,} letters; say it shorter")
    return body


def _question(body: bytes) -> str:
    try:
        said = json.loads(body)["question"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = None
    if not isinstance(said, str):
        raise UserError("no question came; load the page again")
    question = " ".join(clean(said).split())
    if not question:
        raise UserError("type a question first")
    if len(question) > MOST:
        raise UserError(f"a question of {len(question):,} letters, {MOST:,} at most; say it shorter")
    return question


def _page(answerer: Answerer, title: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    return environment.from_string(_file("page.html.j2")).render(title=title, silos=answerer.silos, most=MOST)


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _without_extra() -> UserError:
    return UserError("the page needs the extra: pip install 'fedtailor[web]'")
