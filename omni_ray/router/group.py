"""One DiT group as the router sees it: its queue, what its work costs, and the handle to its replicas."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from omni_ray.config.spec import DitGroup
from omni_ray.errors import Cancelled, EngineFailed, OmniRayError, Unavailable
from omni_ray.messages import Capabilities, Event, Failure, Job, Media, Queued, StepEvent, Usage
from omni_ray.router import balance
from omni_ray.router.cost import CostModel
from omni_ray.router.jobs import JobRecord
from omni_ray.router.queue import GroupQueue
from omni_ray.router.quota import Quotas

logger = logging.getLogger("ray.serve")

MAX_ATTEMPTS = 3


class GroupDispatcher:
    """Admits, queues and dispatches the jobs of one group, and runs a job again if its replica dies."""

    def __init__(self, spec: DitGroup, handle: DeploymentHandle, quotas: Quotas | None = None) -> None:
        self._spec = spec
        self._handle = handle
        self._costs = CostModel()
        self.queue = GroupQueue(spec.id, spec.queue.max_queued_requests, self._capacity, quotas)
        self.capabilities: Capabilities | None = None

    def _capacity(self) -> int:
        return max(balance.num_replicas.get(self._handle.deployment_name, 1), 1) * self._spec.batching.max_num_seqs

    async def describe(self) -> Capabilities:
        """What the group's pipeline accepts; waits until a replica is up."""
        if self.capabilities is None:
            self.capabilities = await self._handle.describe.remote()
        return self.capabilities

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events. The last one is exactly one Usage or Failure, whatever happens to the replicas."""
        record = JobRecord(job=job, cost_s=self._costs.estimate_s(job))
        try:
            self.queue.admit(record)
            async for place in self.queue.wait_turn(record):
                yield Queued(job_id=job.id, position=place, start_s=self.queue.start_s(record))
            record.state = "running"
            async for event in self._attempts(record):
                yield event
        except OmniRayError as error:
            record.state = "failed"
            yield Failure(job_id=job.id, error=error)
        finally:
            if record.state in ("queued", "running"):
                record.state = "cancelled"
            await asyncio.shield(self.queue.leave(record))

    async def _attempts(self, record: JobRecord) -> AsyncIterator[Event]:
        """Media are held back until the job is whole, so that a second attempt cannot send them twice."""
        media: list[Media] = []
        while True:
            record.attempts += 1
            media.clear()
            try:
                async for event in self._attempt(record):
                    if isinstance(event, Media):
                        media.append(event)
                        continue
                    if isinstance(event, Usage):
                        self._finish(record, event)
                        for each in media:
                            yield each
                    elif isinstance(event, Failure):
                        record.state = "cancelled" if isinstance(event.error, Cancelled) else "failed"
                    yield event
                    if isinstance(event, (Usage, Failure)):
                        return
                raise EngineFailed(f"{self._spec.id} ended request {record.job.id} without an answer")
            except (RayActorError, Unavailable) as error:
                logger.warning(
                    "%s: attempt %d of job %s lost its replica: %s",
                    self._spec.id,
                    record.attempts,
                    record.job.id,
                    error,
                )
                if record.attempts == MAX_ATTEMPTS:
                    raise Unavailable(
                        f"{self._spec.id} lost its replica {MAX_ATTEMPTS} times while it ran this request"
                    ) from error
                record.progress = 0.0

    async def _attempt(self, record: JobRecord) -> AsyncIterator[Event]:
        """One attempt, under an id of its own: the replica may still be unwinding the one before."""
        attempt = dataclasses.replace(record.job, id=f"{record.job.id}.{record.attempts}")
        balance.remaining_s[attempt.id] = record.remaining_s
        stream = self._handle.options(stream=True).run.remote(attempt)
        try:
            async for event in stream:
                if isinstance(event, StepEvent):
                    record.progress = event.step / event.num_steps
                    balance.remaining_s[attempt.id] = record.remaining_s
                yield dataclasses.replace(event, job_id=record.job.id)
        finally:
            balance.remaining_s.pop(attempt.id, None)
            stream.cancel()

    def _finish(self, record: JobRecord, usage: Usage) -> None:
        record.state = "done"
        self._costs.learn(record.job, usage.device_s)
