"""One question at a time: who asks meanwhile waits in line, and who leaves stops the writing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from fedtailor.errors import RunError
from fedtailor.retrieval.answered import Answered, Answerer

LONGEST = 32  # line: who comes later is told to come again


class Turns:
    """The line before an answerer. All its work is done in one thread: what it opens there, it may use there again."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.line: list[asyncio.Event] = []  # of who asks, set when there is news; first: whose question is being answered
        self.stopped = False
        self.thread = ThreadPoolExecutor(1, "fedtailor-ask")

    async def ask(self, question: str) -> AsyncGenerator[int | Answered, None]:
        """How many are ahead, while there are any; then the answer as it grows. Where the reader is slower than the answerer,
        it is given the latest. Closing it, at any time, stops the answerer at what it yields next. Raises RunError where
        the line is too long or was stopped, and what the answerer raises."""
        self._check()
        if len(self.line) >= LONGEST:
            raise RunError("too many questions are waiting; ask again later")
        news = asyncio.Event()
        self.line.append(news)
        try:
            while ahead := self.line.index(news):
                news.clear()
                yield ahead
                await self._wait(news)
            async with aclosing(self._answered(question, news)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            place = self.line.index(news)
            del self.line[place]
            for behind in self.line[place:]:
                behind.set()

    async def _answered(self, question: str, news: asyncio.Event) -> AsyncGenerator[Answered, None]:
        loop, left = asyncio.get_running_loop(), threading.Event()
        latest: list[Answered] = []

        def put(piece: Answered) -> None:
            latest[:] = [piece]
            news.set()

        def work() -> None:
            if left.is_set():
                return
            pieces = self.answerer.ask(question)
            try:
                for piece in pieces:
                    if left.is_set():
                        return
                    loop.call_soon_threadsafe(put, piece)
            finally:
                if isinstance(pieces, Generator):
                    pieces.close()

        working = loop.run_in_executor(self.thread, work)
        working.add_done_callback(lambda _: news.set())
        try:
            while True:
                await self._wait(news)
                news.clear()
                ended = working.done()  # what it put came before
                if latest:
                    yield latest.pop()
                if ended:
                    await working
                    return
        finally:
            left.set()
            working.cancel()  # where the thread is still busy with a question that nobody waits for

    async def _wait(self, news: asyncio.Event) -> None:
        await news.wait()
        self._check()

    def _check(self) -> None:
        if self.stopped:
            raise RunError("the page was closed where it is served")

    def stop(self) -> None:
        """All who ask are told that it is over."""
        self.stopped = True
        for news in self.line:
            news.set()
        self.thread.shutdown(wait=False, cancel_futures=True)
