"""The router actor: maps model names to groups, runs DiT jobs through their group's queue, and knows what is ready.

Requests of AR models do not pass through here. The API asks for the :meth:`Router.routes` now and then, and streams
from the group that they name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from omni_ray.config.live import LiveConfig
from omni_ray.config.spec import ArGroup, DitGroup, Model, OmniSpec, Pipeline
from omni_ray.errors import ConfigError, OmniRayError
from omni_ray.messages import Event, Failure, GroupStatus, Job, LoadProgress, Route, Snapshot
from omni_ray.router.group import GroupDispatcher
from omni_ray.router.meters import tell_forever
from omni_ray.router.quota import Quotas
from omni_ray.router.runner import JobRunner
from omni_ray.router.watchers import watch_all_nodes
from omni_ray.store.store import Store
from omni_ray.store.stored import StoredJob
from omni_ray.watch import look_after_neighbours

logger = logging.getLogger("ray.serve")

STATUS_MAX_AGE_S = 0.5
STATUS_TIMEOUT_S = 2.0
"""So long Ray Serve's controller may take to answer; then what it said last counts."""


CAN_START = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""States of a deployment whose replicas, if it has none now, Ray Serve starts for a request."""


class Router:
    """``handles`` are those of the DiT groups, by group id; ``deployments`` name every group's deployment."""

    async def __init__(  # type: ignore[misc]
        self, spec: OmniSpec, handles: dict[str, DeploymentHandle], deployments: dict[str, str]
    ) -> None:
        look_after_neighbours()
        self._spec = spec
        self._deployments = deployments
        self._quotas = Quotas()
        self._groups = {
            g.id: GroupDispatcher(g, handles[g.id], self._quotas) for g in spec.groups if isinstance(g, DitGroup)
        }
        self._runner = JobRunner(Store(spec.jobs), self._groups, spec.jobs.expire_after_s)
        self._progress: dict[str, dict[str, LoadProgress]] = {g.id: {} for g in spec.groups}
        self._application = serve.get_replica_context().app_name
        self._overview: ApplicationStatusOverview | None = None
        self._overview_time = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._describing: dict[str, asyncio.Task[Any]] = {}
        self._telling = asyncio.create_task(tell_forever(spec, self.status))
        self._watching = asyncio.create_task(watch_all_nodes())

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """Run a DiT job. Yields its events, last exactly one Usage or Failure; closing the stream cancels the job."""
        dispatcher = self._groups[job.group]
        try:
            record = dispatcher.admit(job)
        except OmniRayError as error:
            yield Failure(job_id=job.id, error=error)
            return
        async for event in dispatcher.run(record):
            if not isinstance(event, Snapshot):
                yield event

    async def submit(self, stored: StoredJob, images: tuple[bytes, ...], mask: bytes | None) -> StoredJob:
        """See :meth:`JobRunner.submit`."""
        return await self._runner.submit(stored, images, mask)

    async def cancel(self, job_id: str) -> StoredJob | None:
        """See :meth:`JobRunner.cancel`."""
        return await self._runner.cancel(job_id)

    async def delete(self, job_id: str) -> None:
        """See :meth:`JobRunner.delete`."""
        await self._runner.delete(job_id)

    async def load(self, group: str) -> tuple[float, float]:
        """See :meth:`GroupDispatcher.load`."""
        return self._groups[group].load()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over queue bounds, by group id, while all goes on; see :class:`LiveConfig`."""
        for group, config in user_config.items():
            if group not in self._groups:
                raise ConfigError(f"user_config: {group!r} is no DiT group; there are {', '.join(self._groups)}")
            if (queue := LiveConfig.model_validate(config).queue) is not None:
                self._groups[group].queue.max_queued = queue.max_queued_requests

    async def count(self, key: str, requests_per_minute: int) -> None:
        """Count a request of an API key. OverLimit if it has made so many in the last minute."""
        self._quotas.count(key, requests_per_minute)

    async def report(self, progress: LoadProgress) -> None:
        """A replica tells what it does while it loads."""
        self._progress[progress.group][progress.replica_id] = progress

    async def routes(self) -> tuple[Route, ...]:
        """Every group and pipeline as the API needs it."""
        ready = {status.group: status.ready for status in await self.status()}
        return tuple([self._route(model, ready) for model in self._spec.models])

    def _route(self, model: Model, ready: dict[str, bool]) -> Route:
        if isinstance(model, Pipeline):
            parts = [self._first(model.rewrite), self._first(model.generate)]
            limits = {"rewrite": parts[0], "generate": parts[1]}
            return Route(
                group=model.id,
                name=model.name,
                profile=None,
                type="pipeline",
                names=(model.name,),
                ready=all(ready[p] for p in parts),
                limits=limits,
            )
        names = (model.id, model.name) if self._first(model.name) == model.id and model.profile else (model.id,)
        return Route(
            group=model.id,
            name=model.name,
            profile=model.profile,
            type=model.type,
            names=names,
            ready=ready[model.id],
            limits=self._limits(model),
        )

    def _first(self, name: str) -> str:
        """The group that a name means: its own id, or the first profile of that name."""
        return next(g.id for g in self._spec.groups if name in (g.id, g.name))

    def _limits(self, group: ArGroup | DitGroup) -> dict[str, Any]:
        if isinstance(group, ArGroup):
            return {}
        dispatcher = self._groups[group.id]
        limits = {"max_prompt_chars": group.limits.max_prompt_chars}
        if dispatcher.capabilities is None:
            if group.id not in self._describing:
                self._describing[group.id] = asyncio.create_task(dispatcher.describe())
            return limits
        described = dataclasses.asdict(dispatcher.capabilities)
        edits = {kind: sorted(fields) for kind, fields in described["edits"].items()}
        sets = {name: sorted(described[name]) for name in ("fields", "needs")}
        return limits | described | sets | {"edits": edits}

    async def status(self) -> tuple[GroupStatus, ...]:
        """Replicas, load progress and queue of every group, as Ray Serve and the replicas tell it."""
        overview = await self._serve_status()
        return tuple([self._group_status(group, overview) for group in self._spec.groups])

    async def _serve_status(self) -> ApplicationStatusOverview | None:
        if self._asking is None and time.monotonic() - self._overview_time > STATUS_MAX_AGE_S:
            self._asking = asyncio.create_task(self._ask_serve())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=STATUS_TIMEOUT_S)
        return self._overview

    async def _ask_serve(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
            self._overview = status.applications.get(self._application)
            self._overview_time = time.monotonic()
        except Exception as error:
            logger.warning("Ray Serve's controller does not tell its status: %s", error)
        finally:
            self._asking = None

    def _group_status(self, group: ArGroup | DitGroup, overview: ApplicationStatusOverview | None) -> GroupStatus:
        deployment = overview.deployments.get(self._deployments[group.id]) if overview else None
        replicas = {str(state): num for state, num in deployment.replica_states.items()} if deployment else {}
        dispatcher = self._groups.get(group.id)
        return GroupStatus(
            group=group.id,
            ready=is_ready(group, deployment),
            replicas=replicas,
            progress=tuple(self._progress[group.id].values()),
            num_queued=len(dispatcher.queue.queued) if dispatcher else 0,
            num_running=len(dispatcher.queue.running) if dispatcher else 0,
            outstanding_s=dispatcher.queue.outstanding_s if dispatcher else 0.0,
            message=deployment.message if deployment else "",
        )


def is_ready(group: ArGroup | DitGroup, deployment: DeploymentStatusOverview | None) -> bool:
    """Whether a request finds a replica: one that runs or, of a group that may have none, one started for it."""
    if deployment is None:
        return False
    may_have_none = group.autoscaling is not None and group.autoscaling.min_replicas == 0
    runs = any(state == "RUNNING" and num > 0 for state, num in deployment.replica_states.items())
    return runs or (may_have_none and deployment.status in CAN_START)
