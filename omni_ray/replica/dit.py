"""A DiT replica: the Serve deployment that owns one gang of ranks and turns its events into one stream per job."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError

from omni_ray.config.live import LiveConfig
from omni_ray.config.spec import DitGroup
from omni_ray.errors import Unavailable
from omni_ray.messages import Capabilities, Event, Job, LoadProgress
from omni_ray.replica import scaling
from omni_ray.replica.meters import JobMeter
from omni_ray.watch import look_after_neighbours

logger = logging.getLogger("ray.serve")


class Gang(Protocol):
    """What a replica needs of the ranks that it owns (``engine.gang.Gang``, handed over by ``app.py``)."""

    def load(self) -> AsyncIterator[LoadProgress | Capabilities]: ...
    def run(self, job: Job) -> AsyncIterator[Event]: ...
    async def set_cache(self, threshold: float | None, max_consecutive_skips: int | None) -> None: ...
    async def join(self) -> None: ...
    def kill(self) -> None: ...


class DitReplica:
    """``launch`` starts the gang for a group, given the replica's id."""

    async def __init__(self, group: DitGroup, launch: Callable[[DitGroup, str], Gang]) -> None:  # type: ignore[misc]
        look_after_neighbours()
        context = serve.get_replica_context()
        self._group = group
        self._router = serve.get_deployment_handle("Router", context.app_name)
        self._replica_id = context.replica_id.unique_id
        self._gang: Gang
        self._capabilities = await self._load(launch)
        self._report(LoadProgress(group=group.id, replica_id=self._replica_id, phase="ready"))
        self._watch = asyncio.create_task(self._die_with_gang())

    async def _load(self, launch: Callable[[DitGroup, str], Gang]) -> Capabilities:
        self._report(LoadProgress(group=self._group.id, replica_id=self._replica_id, phase="starting"))
        try:
            self._gang = launch(self._group, self._replica_id)
            async for step in self._gang.load():
                if isinstance(step, Capabilities):
                    return step
                self._report(step)
            raise Unavailable(f"{self._group.id}: the gang ended while it loaded")
        except Exception as error:
            self._report(
                LoadProgress(group=self._group.id, replica_id=self._replica_id, phase="failed", detail=str(error))
            )
            raise

    def _report(self, progress: LoadProgress) -> None:
        """Tell the router, without waiting for it."""
        self._router.report.remote(progress)

    async def _die_with_gang(self) -> None:
        """A gang that lost a rank is gone: end the process at once, so that Serve starts a new replica."""
        try:
            await self._gang.join()
        except (RayActorError, Unavailable) as error:
            logger.error("%s: lost a rank, this replica ends: %s", self._group.id, error)
        self._gang.kill()
        os._exit(1)

    async def describe(self) -> Capabilities:
        """What the pipeline accepts."""
        return self._capabilities

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events, last a Usage or a Failure; closing the stream cancels it. Unavailable if a rank dies."""
        meter = JobMeter(self._group)
        try:
            async for event in self._gang.run(job):
                meter.see(event)
                yield event
        except RayActorError as error:
            raise Unavailable(f"{self._group.id} lost a rank") from error
        finally:
            meter.end()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`omni_ray.replica.scaling.ByOutstandingSeconds` decides by: the work of the whole group."""
        outstanding_s, busy = await self._router.load.remote(self._group.id)
        return {scaling.OUTSTANDING_S: outstanding_s, scaling.BUSY: busy}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over what of the group can change while it runs; see :class:`LiveConfig`."""
        live = LiveConfig.model_validate(user_config)
        if live.cache is not None:
            await self._gang.set_cache(live.cache.threshold, live.cache.max_consecutive_skips)

    async def check_health(self) -> None:
        if self._watch.done():
            raise Unavailable(f"{self._group.id} lost its gang")
