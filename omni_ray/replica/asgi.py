"""One HTTP exchange with an ASGI application of this process: no socket, no server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from omni_ray.errors import EngineFailed
from omni_ray.messages import HttpHead, HttpRequest

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
AsgiApp = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Exchange:
    """Hands ``request`` to ``app`` and gives its answer as it is made.

    The application runs in a task of its own and is never cancelled from outside: vLLM's handlers start child tasks
    that would go on without their parent. ``close`` tells it instead that the client is gone (`http.disconnect`), at
    which it stops its work by itself.
    """

    _tasks: set[asyncio.Task[None]] = set()  # noqa: RUF012  keeps running tasks from being collected

    def __init__(self, app: AsgiApp, request: HttpRequest) -> None:
        self._request = request
        self._body_read = False
        self._head: HttpHead | None = None
        self._pieces: list[bytes] = []
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._closed = asyncio.Event()
        task = asyncio.create_task(self._run(app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def head(self) -> HttpHead:
        """The status and headers, once the first piece of the body is there too, or the body has ended without one.

        :raises EngineFailed: the application ended without an answer.
        """
        while not (self._pieces or self._ended.is_set()):
            self._news.clear()
            await self._news.wait()
        if self._head is None:
            raise EngineFailed(f"{self._request.method} {self._request.path}: the engine ended without an answer")
        return self._head

    async def body(self, join_s: float) -> AsyncGenerator[bytes, None]:
        """The pieces of the body: the first two at once (a chat stream opens with a piece that bears the role alone),
        later ones joined over ``join_s`` seconds, the last at once."""
        num_sent = 0
        while True:
            if self._pieces:
                due = asyncio.get_running_loop().time() + join_s
                piece, self._pieces = b"".join(self._pieces), []
                yield piece
                num_sent += 1
                if join_s and num_sent > 1:
                    await self._ended_by(due)
            elif self._ended.is_set():
                return
            else:
                self._news.clear()
                await self._news.wait()

    def close(self) -> None:
        """Tell the application that nobody reads any more. After the end of the answer this does nothing."""
        self._closed.set()

    async def _ended_by(self, due: float) -> None:
        try:
            async with asyncio.timeout_at(due):
                await self._ended.wait()
        except TimeoutError:
            pass

    async def _run(self, app: AsgiApp) -> None:
        try:
            await app(_scope(self._request), self._receive, self._send)
        except Exception:
            if not self._closed.is_set():
                logger.exception("%s %s failed inside the application", self._request.method, self._request.path)
        finally:
            self._end()

    async def _receive(self) -> Message:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"])
            self._head = HttpHead(status=message["status"], headers=headers)
        elif message["type"] == "http.response.body":
            if piece := message.get("body"):
                self._pieces.append(bytes(piece))
                self._news.set()
            if not message.get("more_body"):
                self._end()

    def _end(self) -> None:
        self._ended.set()
        self._news.set()


def _scope(request: HttpRequest) -> Message:
    path, _, query = request.path.partition("?")
    return {
        "type": "http",
        # From 2.4 on Starlette notices a lost client only when it sends; 2.3 makes it listen for `http.disconnect`.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
        "client": None,
        "server": None,
        "state": {},
    }
