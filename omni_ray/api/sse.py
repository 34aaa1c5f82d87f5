"""Server-sent events: their wording, and the response that sends pieces of a body as they come."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from omni_ray.api import caller
from omni_ray.api.errors import error_from
from omni_ray.api.meters import note_failure

logger = logging.getLogger("ray.serve")

CONTENT_TYPE = b"text/event-stream"
HEADERS = ((b"content-type", CONTENT_TYPE + b"; charset=utf-8"), (b"cache-control", b"no-cache"))
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One event that carries ``data`` as JSON."""
    return b"data: " + to_json(data) + b"\n\n"


def typed_event(data: dict[str, Any]) -> bytes:
    """As :func:`event`, under the name that the data's own ``type`` is."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


class EventStream(Response):
    """Sends ``pieces`` of an event stream as they come. An error after the start is the stream's last event.

    It does not watch for the client's disconnect as Starlette's `StreamingResponse` does: Ray Serve does, and cancels
    the task that runs this, which closes ``pieces``.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], status: int = 200, headers: Iterable[tuple[bytes, bytes]] = HEADERS
    ) -> None:
        self.background = None
        self.status_code = status
        self.raw_headers = [*headers]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._pieces):
            try:
                async for piece in self._pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except Exception as error:
                caller.note_failure()
                logger.warning("a stream ended in an error: %s", error)
                note_failure()
                await send({"type": "http.response.body", "body": event(error_from(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
