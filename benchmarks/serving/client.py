"""Sends a request and follows it to its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from pydantic_core import from_json

from benchmarks.serving.answer import Reader, Refused
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.request import PATHS, Request
from benchmarks.serving.sse import DONE, Decoder


@dataclass(frozen=True)
class Target:
    """The server, the headers that it gets, and how long a request may take, in seconds."""

    base_url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    poll_interval_s: float = 0.25


class Client:
    """An HTTP session with ``target``, without a limit on connections. Enter it before use."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def __aenter__(self) -> Client:
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            self._target.base_url, headers=self._target.headers, timeout=timeout, connector=connector
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def send(self, request: Request, index: int, start: float, attempt: int = 0) -> Outcome:
        """The outcome, whatever happens; ``start`` is the monotonic time at which the run began."""
        sent = time.monotonic()
        outcome = Outcome(index, request.label, request.kind, request.model, request.at_s, sent - start, 0.0, attempt)
        reader = Reader(outcome, sent)
        try:
            async with asyncio.timeout(self._target.timeout_s):
                await (self._video if request.kind == "videos" else self._post)(request, outcome, reader)
        except Refused as refusal:
            outcome.failure = str(refusal)
        except TimeoutError:
            outcome.failure = "timeout"
        except aiohttp.ClientError as error:
            outcome.failure, outcome.detail = f"connection: {type(error).__name__}", str(error)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            outcome.failure, outcome.detail = "unreadable answer", f"{type(error).__name__}: {error}"
        outcome.end_s = time.monotonic() - start
        outcome.start_estimate = reader.forecast.start
        outcome.end_estimate = None if outcome.failure else reader.forecast.end()
        return outcome

    async def _post(self, request: Request, outcome: Outcome, reader: Reader) -> None:
        async with self._session.post(PATHS[request.kind], json=request.body) as reply:
            await _check(reply, outcome)
            if reply.content_type == "text/event-stream":
                await _read_stream(reply, reader)
                return
            body = await reply.read()
            outcome.first_s = time.monotonic() - reader.sent
            reader.whole(body)

    async def _video(self, request: Request, outcome: Outcome, reader: Reader) -> None:
        path = PATHS["videos"]
        form = aiohttp.FormData({name: str(value) for name, value in request.body.items()})
        async with self._session.post(path, data=form) as reply:
            await _check(reply, outcome)
            job = from_json(await reply.read())
        while job["status"] in ("queued", "in_progress"):
            reader.forecast.tell(job)
            await asyncio.sleep(self._target.poll_interval_s)
            job = await self._get(f"{path}/{job['id']}", outcome)
        if job["status"] != "completed":
            raise Refused(f"job {job['status']}: {(job.get('error') or {}).get('code')}")
        async with self._session.get(f"{path}/{job['id']}/content") as reply:
            await _check(reply, outcome)
            outcome.num_outputs = int(bool(await reply.read()))
        if not outcome.num_outputs:
            raise Refused("nothing in the video")

    async def _get(self, path: str, outcome: Outcome) -> Any:
        async with self._session.get(path) as reply:
            await _check(reply, outcome)
            return from_json(await reply.read())


async def _check(reply: aiohttp.ClientResponse, outcome: Outcome) -> None:
    outcome.status = reply.status
    if reply.status < 300:
        return
    outcome.detail = (await reply.text(errors="replace"))[:500]
    told = reply.headers.get("Retry-After", "")
    outcome.retry_after_s = float(told) if told.replace(".", "", 1).isdigit() else None
    raise Refused(f"HTTP {reply.status}")


async def _read_stream(reply: aiohttp.ClientResponse, reader: Reader) -> None:
    decoder = Decoder()
    async for piece in reply.content.iter_any():
        now = time.monotonic()
        for data in decoder.feed(piece):
            if data != DONE:
                reader.event(data, now)
    reader.end()
