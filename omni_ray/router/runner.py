"""Runs the jobs of the store: those that are submitted here, and those that another router has left."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from omni_ray.errors import OmniRayError
from omni_ray.messages import Event, Failure, Media, Queued, Snapshot, StepEvent, Usage
from omni_ray.router.group import GroupDispatcher
from omni_ray.router.jobs import JobRecord
from omni_ray.store.records import LEASE_S
from omni_ray.store.store import Store
from omni_ray.store.stored import Status, StoredJob

logger = logging.getLogger("ray.serve")

SAVE_S = 0.5
"""Progress is stored this often."""

SNAPSHOT_S = 1.0
"""And snapshots this often: of what another router takes over, so much is computed again."""

EXPIRE_S = 30.0
ASKED = "a client asked for it"
"""Why a job's task is cancelled, if it is not because the process ends."""


class JobRunner:
    """``groups`` are the dispatchers by group id, ``expire_after_s`` is the time that a job's media are kept."""

    def __init__(self, store: Store, groups: Mapping[str, GroupDispatcher], expire_after_s: float) -> None:
        self._store = store
        self._groups = groups
        self._expire_after_s = expire_after_s
        self._owner = uuid.uuid4().hex
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keeper = asyncio.create_task(self._keep())

    async def submit(self, stored: StoredJob, images: tuple[bytes, ...], mask: bytes | None) -> StoredJob:
        """Admit and store a job, and start to work on it. One that is in the store already stays as it is.

        :raises Overloaded: the group's queue is full.
        """
        if (known := await self._store.get(stored.id)) is not None:
            return known
        group = self._groups[stored.job.group]
        record = group.admit(dataclasses.replace(stored.job, images=images, mask=mask))
        try:
            stored = dataclasses.replace(stored, num_images=len(images), has_mask=mask is not None)
            is_new = await self._store.create(stored, images, mask, self._owner)
        except BaseException:
            await group.leave(record)
            raise
        if is_new:
            self._start(stored, record)
            return stored
        await group.leave(record)
        return await self._store.get(stored.id) or stored

    async def cancel(self, job_id: str) -> StoredJob | None:
        """Stop the work on a job that is not over. Returns the job as it is then, None if there is none."""
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel(ASKED)
            await asyncio.wait([task])
        stored = await self._store.get(job_id)
        if stored is None or stored.is_over:
            return stored
        stored = ended(stored, "cancelled", self._expire_after_s)  # its router is gone, or has not begun
        await self._store.save(stored, None)
        return stored

    async def delete(self, job_id: str) -> None:
        """Stop the work on a job, and forget it."""
        await self.cancel(job_id)
        await self._store.delete(job_id)

    def _start(self, stored: StoredJob, record: JobRecord) -> None:
        task = asyncio.create_task(_Work(self._store, self._owner, stored, self._expire_after_s).run(self, record))
        self._tasks[stored.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(stored.id, None))

    def events(self, record: JobRecord) -> Any:
        return self._groups[record.job.group].run(record)

    async def _keep(self) -> None:
        """Renew the lease of one's own jobs, adopt what is left, remove what is old."""
        expired_at = 0.0
        while True:
            try:
                for stored in await self._store.renew_and_adopt(self._owner, list(self._groups)):
                    await self._adopt(stored)
                if time.monotonic() - expired_at > EXPIRE_S:
                    await self._store.expire()
                    expired_at = time.monotonic()
            except Exception:
                logger.exception("the store of jobs cannot be kept")
            await asyncio.sleep(LEASE_S / 4)

    async def _adopt(self, stored: StoredJob) -> None:
        if stored.id in self._tasks:
            return
        logger.warning("job %s is taken over after step %d", stored.id, stored.resume_step)
        try:
            job = await self._store.whole_job(stored)
        except OSError as error:
            logger.exception("job %s cannot be gone on with", stored.id)
            lost = dataclasses.replace(ended(stored, "failed", self._expire_after_s), error=_error(error))
            await self._store.save(lost, self._owner)
            return
        record = self._groups[stored.job.group].admit(job, always=True)
        if stored.resume_step:
            record.progress = stored.resume_step / max(stored.num_steps, 1)
        self._start(dataclasses.replace(stored, attempts=stored.attempts + 1), record)


class _Work:
    """Follows one job, and stores what becomes of it."""

    def __init__(self, store: Store, owner: str, stored: StoredJob, expire_after_s: float) -> None:
        self._store = store
        self._owner = owner
        self._stored = stored
        self._expire_after_s = expire_after_s
        self._saved_at = 0.0
        self._snapshot_at = time.monotonic()

    async def run(self, runner: JobRunner, record: JobRecord) -> None:
        try:
            async with aclosing(runner.events(record)) as events:
                async for event in events:
                    await self._take(event)
        except asyncio.CancelledError as reason:
            if reason.args != (ASKED,):
                raise  # this process ends: another router goes on with the job
            await self._end("cancelled")
        except _Lost:
            logger.warning("job %s was deleted, or another router has it", self._stored.id)
        except Exception as error:
            logger.exception("job %s", self._stored.id)
            await self._end("failed", error=_error(error))

    async def _take(self, event: Event) -> None:
        match event:
            case Queued():
                changes: dict[str, Any] = {
                    "queue_position": event.position,
                    "start_s": event.start_s,
                    "seconds_left": event.end_s,
                }
                await self._save(changes)
            case StepEvent():
                running = {"status": "in_progress", "queue_position": None, "start_s": None}
                started = self._stored.started_at or time.time()
                skipped = (self._stored.steps_skipped if event.step > 1 else 0) + (not event.computed)
                steps = {
                    "step": event.step,
                    "num_steps": event.num_steps,
                    "steps_skipped": skipped,
                    "seconds_left": event.end_s,
                }
                await self._save({**running, **steps, "started_at": started}, at_once=not self._stored.started_at)
            case Snapshot() if time.monotonic() - self._snapshot_at > SNAPSHOT_S:
                before = self._stored.resume_step
                self._stored = await self._store.add_snapshot(self._stored, event.step, event.data)
                await self._save({}, at_once=True)
                await self._store.drop_snapshot(self._stored.id, before)
                self._snapshot_at = time.monotonic()
            case Media():
                self._stored = await self._store.add_media(self._stored, event)
            case Usage():
                usage = {name: value for name, value in dataclasses.asdict(event).items() if name != "job_id"}
                await self._end("completed", usage=usage)
            case Failure():
                await self._end("failed", error=_error(event.error))
            case _:
                pass

    async def _save(self, changes: dict[str, Any], *, at_once: bool = False) -> None:
        self._stored = dataclasses.replace(self._stored, **changes)
        if at_once or time.monotonic() - self._saved_at > SAVE_S:
            self._saved_at = time.monotonic()
            if not await self._store.save(self._stored, self._owner):
                raise _Lost

    async def _end(self, status: Status, **changes: Any) -> None:
        snapshot = self._stored.resume_step
        self._stored = dataclasses.replace(ended(self._stored, status, self._expire_after_s), **changes)
        await self._store.save(self._stored, self._owner)
        await self._store.drop_snapshot(self._stored.id, snapshot)


class _Lost(Exception):
    """The job is no longer this router's."""


def ended(stored: StoredJob, status: Status, expire_after_s: float) -> StoredJob:
    """``stored`` as it is when it is over."""
    now = time.time()
    return dataclasses.replace(
        stored,
        status=status,
        completed_at=now,
        expires_at=now + expire_after_s,
        queue_position=None,
        start_s=None,
        seconds_left=None,
        resume_step=0,
    )


def _error(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, OmniRayError):
        error = OmniRayError("the server failed at this job; its log tells more")
    told: dict[str, Any] = error.body()["error"]
    return told
