"""Calls from the ingress to other deployments: waits, second attempts, and the end of a call that nobody reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from omni_ray.api.directory import Directory
from omni_ray.api.errors import LOST, error_from
from omni_ray.errors import Unavailable

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

BACKOFF_S = (0.5, 2.0)
"""Before each further attempt. Together longer than a replica with a dead engine takes to leave."""
WAIT_FOR_REPLICA_S = 180.0
"""A request that lost its replica waits this long for the group to have one again."""


async def call(directory: Directory, group: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """What ``attempt`` gives; see :func:`stream`."""

    async def once() -> AsyncGenerator[T, None]:
        yield await attempt()

    async with aclosing(stream(directory, group, once)) as results:
        return await anext(results)


async def stream(
    directory: Directory, group: str, attempt: Callable[[], AsyncGenerator[T, None]]
) -> AsyncGenerator[T, None]:
    """What ``attempt`` yields. If its replica is lost it is begun anew, so that what it yielded before comes again;
    three attempts are made at most.

    :raises OmniRayError: Overloaded when the group's queue is full, Unavailable when no replica lived long enough or
        the group cannot start, and whatever the replica itself raised.
    """
    async with directory.alive(group) as wait:
        for pause in (*BACKOFF_S, None):
            try:
                async with aclosing(attempt()) as results:
                    async for result in results:
                        yield result
                return
            except LOST as error:
                if pause is None:
                    times = len(BACKOFF_S) + 1
                    raise Unavailable(f"{group} lost its replica {times} times while it ran this request") from error
                logger.warning("%s lost a replica, the request is sent again: %s", group, error_from(error))
                wait.until = wait.until or asyncio.get_running_loop().time() + WAIT_FOR_REPLICA_S
                await asyncio.sleep(pause)
            except (RayError, RayServeException) as error:
                raise error_from(error) from error


async def items(stream: Any) -> AsyncGenerator[Any, None]:
    """What ``stream``, a `DeploymentResponseGenerator`, yields. Closed or cancelled before its end, this cancels the
    call inside the replica."""
    try:
        async for item in stream:
            yield item
    except BaseException:
        stream.cancel()
        raise
