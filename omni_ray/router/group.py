"""One DiT group as the router sees it: its queue, what its work costs, and the handle to its replicas."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from omni_ray import metrics
from omni_ray.config.spec import DitGroup
from omni_ray.errors import Cancelled, EngineFailed, OmniRayError, Overloaded, Unavailable
from omni_ray.messages import Capabilities, Event, Failure, Job, Media, Queued, Snapshot, StepEvent, Usage
from omni_ray.meters import Meters
from omni_ray.router import outstanding
from omni_ray.router.cost import CostModel
from omni_ray.router.jobs import JobRecord
from omni_ray.router.queue import GroupQueue
from omni_ray.router.quota import Quotas
from omni_ray.router.rate import Rate

logger = logging.getLogger("ray.serve")

MAX_ATTEMPTS = 3


class GroupDispatcher:
    """Admits, queues and dispatches the jobs of one group, and runs a job again if its replica dies."""

    def __init__(self, spec: DitGroup, handle: DeploymentHandle, quotas: Quotas) -> None:
        self._spec = spec
        self._quotas = quotas
        self._handle = handle
        self._costs = CostModel()
        self._meters = Meters.of(spec)
        self._busy = Rate()
        self.queue = GroupQueue(spec.id, spec.queue.max_queued_requests, self._num_replicas, spec.batching.max_num_seqs)
        self.capabilities: Capabilities | None = None

    def _num_replicas(self) -> int:
        return max(outstanding.num_replicas.get(self._handle.deployment_name, 1), 1)

    def load(self) -> tuple[float, float]:
        """Device seconds of all that waits or runs, and device seconds that were used a second, of late: as many as
        replicas were busy."""
        return self.queue.outstanding_s, self._busy.now()

    async def describe(self) -> Capabilities:
        """What the group's pipeline accepts; waits until a replica is up."""
        if self.capabilities is None:
            self.capabilities = await self._handle.describe.remote()
        return self.capabilities

    def admit(self, job: Job, *, always: bool = False) -> JobRecord:
        """Queue the job; Overloaded if the queue is full and not ``always``. It then has to be run."""
        if self.capabilities is not None:
            job = dataclasses.replace(job, params=self.capabilities.defaults | job.params)
        record = JobRecord(job=job, cost_s=self._costs.estimate_s(job))
        try:
            self._quotas.admit(record, always=always)
            self.queue.admit(record, always=always)
        except OmniRayError as error:
            self._quotas.leave(record)
            if isinstance(error, Overloaded):
                self._meters.count(metrics.REFUSED)
            raise
        return record

    async def leave(self, record: JobRecord) -> None:
        """An admitted job is over, whether it ran or not."""
        self._quotas.leave(record)
        await self.queue.leave(record)

    async def run(self, record: JobRecord) -> AsyncIterator[Event]:
        """The events of an admitted job. The last one is exactly one Usage or Failure, whatever happens to the
        replicas."""
        job = record.job
        try:
            async for place in self.queue.wait_turn(record):
                start_s, end_s = self.queue.estimate_s(record)
                yield Queued(job_id=job.id, position=place, start_s=start_s, end_s=end_s)
            record.state = "running"
            self._meters.observe(metrics.QUEUE_S, time.monotonic() - record.created, hop="router")
            async for event in self._attempts(record):
                yield event
        except OmniRayError as error:
            record.state = "failed"
            yield Failure(job_id=job.id, error=error)
        finally:
            if record.state in ("queued", "running"):
                record.state = "cancelled"
            await asyncio.shield(self.leave(record))

    async def _attempts(self, record: JobRecord) -> AsyncIterator[Event]:
        """Media are held back until the job is whole, so that a second attempt cannot send them twice."""
        media: list[Media] = []
        last_step = 0
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
                if record.resume and record.resume.step > last_step:  # it gets on
                    last_step, record.attempts = record.resume.step, 0
                if record.attempts == MAX_ATTEMPTS:
                    raise Unavailable(
                        f"{self._spec.id} lost its replica {MAX_ATTEMPTS} times while it ran this request"
                    ) from error
                record.progress = record.resume.step / record.num_steps if record.resume else 0.0

    async def _attempt(self, record: JobRecord) -> AsyncIterator[Event]:
        """One attempt, under an id of its own: the replica may still be unwinding the one before."""
        resume = record.resume.data if record.resume else record.job.resume
        attempt = dataclasses.replace(record.job, id=f"{record.job.id}.{uuid.uuid4().hex[:6]}", resume=resume)
        outstanding.remaining_s[attempt.id] = record.remaining_s
        stream = self._handle.options(stream=True).run.remote(attempt)
        try:
            async for event in stream:
                if isinstance(event, StepEvent):
                    record.num_steps, record.progress = event.num_steps, event.step / event.num_steps
                    outstanding.remaining_s[attempt.id] = record.remaining_s
                    event = dataclasses.replace(event, end_s=self.queue.estimate_s(record)[1])
                elif isinstance(event, Snapshot):
                    record.resume = event
                yield dataclasses.replace(event, job_id=record.job.id)
        finally:
            outstanding.remaining_s.pop(attempt.id, None)
            stream.cancel()

    def _finish(self, record: JobRecord, usage: Usage) -> None:
        record.state = "done"
        self._busy.add(usage.device_s)
        if record.attempts == 1 and record.job.resume is None:  # else it tells a part of the cost only
            self._costs.learn(record.job, usage.device_s)
