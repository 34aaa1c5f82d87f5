"""Bodies, errors, streams and waits of the HTTP edge, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from omni_ray.api import calls, directory
from omni_ray.api.body import model_name, parse_object, read_body
from omni_ray.api.calls import call
from omni_ray.api.directory import Directory
from omni_ray.api.errors import error_from, error_response
from omni_ray.api.metrics import merge
from omni_ray.api.sse import EventStream
from omni_ray.errors import EngineFailed, Overloaded, RequestError, TooLarge, Unavailable, UnknownModel
from omni_ray.messages import GroupStatus, LoadProgress, Route


def request(*pieces: bytes, length: int | None = None) -> Request:
    """A POST whose body comes in ``pieces``; asking for more than there are fails."""
    waiting = list(pieces)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def test_a_body_is_read_whole() -> None:
    assert await read_body(request(b"ab", b"cd"), 4) == b"abcd"


async def test_a_long_body_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge, match="longer than the 4 bytes"):
        await read_body(request(length=5), 4)


async def test_a_long_body_in_chunks_is_refused_where_it_gets_too_long() -> None:
    with pytest.raises(TooLarge):
        await read_body(request(b"abc", b"de", b"never read"), 4)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1,}', b'{"a": "\\ud800"}'])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="the body is not JSON"):
        parse_object(body)


@pytest.mark.parametrize("body", [b"[1]", b"null", b'"x"', b"3"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="is not an object"):
        parse_object(body)


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 3}])
def test_a_body_has_to_name_its_model(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        model_name(body)
    assert caught.value.param == "model"


def test_errors_of_ray_become_ours() -> None:
    failed = EngineFailed("out of device memory")
    assert error_from(RayTaskError("run", "trace", failed).as_instanceof_cause()) is failed
    assert error_from(ActorDiedError()).status == 503
    assert error_from(BackPressureError(5, 4)).status == 429


def test_an_unforeseen_error_tells_its_request_and_nothing_else() -> None:
    error = error_from(KeyError("secret"), "r-1")
    assert (error.status, "r-1" in error.message, "secret" in error.message) == (500, True, False)


def test_an_error_response_is_openais() -> None:
    response = error_response(Overloaded("full", param="model", retry_after_s=1.2))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    body = {"message": "full", "type": "rate_limit_error", "param": "model", "code": "queue_full"}
    assert json.loads(bytes(response.body)) == {"error": body}


async def sent(pieces: AsyncGenerator[bytes, None]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await EventStream(pieces)({"type": "http"}, None, send)  # type: ignore[arg-type]
    return messages


async def test_a_stream_that_fails_ends_in_an_error_event() -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise Unavailable("lost")

    start, first, error, end = await sent(pieces())
    assert start["status"] == 200
    assert first["body"] == b"data: 1\n\n"
    assert json.loads(error["body"].removeprefix(b"data: "))["error"]["message"] == "lost"
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_stream_that_nobody_reads_is_closed() -> None:
    closed = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            closed.set()

    task = asyncio.create_task(sent(pieces()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


def test_pages_of_metrics_are_merged_by_name() -> None:
    one = '# HELP a A.\n# TYPE a counter\na{node="1"} 1\n# TYPE b gauge\nb{node="1"} 2\n'
    two = '# HELP a A.\n# TYPE a counter\na{node="2"} 3\n'
    merged = '# HELP a A.\n# TYPE a counter\na{node="1"} 1\na{node="2"} 3\n# TYPE b gauge\nb{node="1"} 2\n'
    assert merge([one, two]) == merged


def test_what_does_not_tell_its_node_is_no_metric_of_the_cluster() -> None:
    page = "# HELP process_open_fds A.\n# TYPE process_open_fds gauge\nprocess_open_fds 3\n"
    assert merge([page, page]) == ""


def remote(function: Callable[[], Any]) -> Any:
    async def answer() -> Any:
        return function()

    return SimpleNamespace(remote=answer)


class Group:
    """A group whose state a test sets, told as the router's handle tells it."""

    def __init__(self) -> None:
        self.ready = True
        self.failed = False
        self.routes = remote(
            lambda: (Route(group="m", name="m", profile=None, type="ar", names=("m",), ready=self.ready),)
        )
        self.status = remote(lambda: (self._status(),))

    def _status(self) -> GroupStatus:
        failed = (LoadProgress(group="m", replica_id="r", phase="failed"),) if self.failed else ()
        return GroupStatus(group="m", ready=self.ready, replicas={}, progress=failed)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(directory, "REFRESH_S", 0.01)
    monkeypatch.setattr(directory, "REFRESH_NOT_READY_S", 0.01)
    monkeypatch.setattr(calls, "BACKOFF_S", (0.0, 0.0))
    return Group()


def attempts(*outcomes: Any) -> Callable[[], Awaitable[Any]]:
    left = list(outcomes)

    async def attempt() -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return await outcome() if callable(outcome) else outcome

    return attempt


async def test_an_unknown_model_is_told_the_known_ones(group: Any) -> None:
    with pytest.raises(UnknownModel, match="The model 'x' does not exist; choose one of: m"):
        await Directory(group).find("x")


async def test_a_lost_replica_is_tried_again(group: Any) -> None:
    assert await call(Directory(group), "m", attempts(ActorDiedError(), Unavailable("dead"), "answer")) == "answer"


async def test_three_lost_replicas_are_one_error(group: Any) -> None:
    with pytest.raises(Unavailable, match="lost its replica 3 times"):
        await call(Directory(group), "m", attempts(ActorDiedError(), ActorDiedError(), ActorDiedError()))


async def test_an_error_of_the_engine_is_not_tried_again(group: Any) -> None:
    with pytest.raises(EngineFailed, match="boom"):
        await call(Directory(group), "m", attempts(EngineFailed("boom")))


async def test_who_waits_for_a_group_that_fails_to_start_is_told(group: Any) -> None:
    group.ready = False
    waiting = asyncio.create_task(call(Directory(group), "m", attempts(lambda: asyncio.sleep(60))))
    await asyncio.sleep(0.03)
    group.failed = True
    with pytest.raises(Unavailable, match="m failed to start"):
        await waiting


async def test_who_lost_a_replica_waits_for_the_next_only_so_long(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WAIT_FOR_REPLICA_S", 0.03)
    group.ready = False
    with pytest.raises(Unavailable, match="has none again yet"):
        await call(Directory(group), "m", attempts(ActorDiedError(), lambda: asyncio.sleep(60)))
