"""Which replica gets a job, asked of the class as Ray Serve hands it to the router: pickled by value."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from omni_ray.messages import Job
from omni_ray.router import outstanding
from omni_ray.router.balance import request_router_config

REPLICAS: Any = [SimpleNamespace(replica_id=name) for name in "abc"]


@pytest.fixture
def router() -> Iterator[Any]:
    router_class: Any = request_router_config().get_request_router_class()
    router = object.__new__(router_class)
    router.initialize_state()
    yield router
    outstanding.remaining_s.clear()


def request(name: str) -> Any:
    context = SimpleNamespace(should_backoff=False)
    args = [Job(id=name, model="m", group="m", params={})]
    return SimpleNamespace(args=args, routing_context=context)


async def send(router: Any, name: str, seconds: float) -> str:
    outstanding.remaining_s[name] = seconds
    return str((await router.choose_replicas(REPLICAS, request(name)))[0][0].replica_id)


async def test_a_job_goes_to_the_replica_with_the_fewest_seconds(router: Any) -> None:
    sent = [await send(router, name, seconds) for name, seconds in [("long", 60), ("short", 3), ("mid", 8)]]
    assert sent == ["a", "b", "c"]
    assert [await send(router, name, 3) for name in ("d", "e", "f", "g")] == ["b", "b", "c", "b"]
    outstanding.remaining_s["long"] = 0.5  # it makes steps
    assert await send(router, "h", 1) == "a"


async def test_jobs_that_are_over_or_went_elsewhere_do_not_count(router: Any) -> None:
    assert [await send(router, name, 5) for name in ("x", "y", "z")] == ["a", "b", "c"]
    router.on_request_routed(request("x"), "c", None)  # a was full
    del outstanding.remaining_s["y"]
    assert [await send(router, name, 4) for name in ("p", "q")] == ["a", "b"]
    assert [await send(router, name, 1) for name in ("r", "s")] == ["a", "b"]  # c has ten seconds


async def test_serve_waits_before_it_asks_full_replicas_again(router: Any) -> None:
    asked = request("x")
    await router.choose_replicas(REPLICAS, asked)
    assert asked.routing_context.should_backoff
