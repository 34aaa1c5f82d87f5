"""Jobs that go on without their client: submitted to the router, asked after in the store."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from omni_ray.api import sse
from omni_ray.api.calls import call
from omni_ray.api.directory import Directory
from omni_ray.api.submission import Submission
from omni_ray.errors import RequestError
from omni_ray.messages import Job, Route
from omni_ray.store.store import Store
from omni_ray.store.stored import Kind, StoredJob

POLL_S = 0.25
"""How often a stream of a job's progress looks into the store."""

NAMESPACE = uuid.UUID("6f0a1f9e-5d0c-4b7e-9d57-0c1a0f7f6d11")
"""Of the ids of jobs whose clients gave an idempotency key."""


class UnknownJob(RequestError):
    status = 404
    code = "not_found"


class NotDone(RequestError):
    status = 409
    code = "not_completed"


class Background:
    """``router`` is the router's handle. Every ingress replica sees the same jobs."""

    def __init__(self, router: DeploymentHandle[Any], directory: Directory, store: Store) -> None:
        self._router = router
        self._directory = directory
        self._store = store

    async def submit(
        self, kind: Kind, route: Route, job: Job, request: dict[str, Any], submission: Submission
    ) -> StoredJob:
        """Queue the job. ``request`` is what replies repeat of the client's words."""
        key, user = submission.idempotency_key, submission.user
        made = uuid.uuid5(NAMESPACE, f"{user}\n{kind}\n{key}") if key else uuid.uuid4()
        name = f"{'video' if kind == 'video' else 'job'}_{made.hex}"
        now = time.time()
        stored = StoredJob(
            id=name,
            kind=kind,
            job=dataclasses.replace(job, id=name, images=(), mask=None),
            user=user,
            request=request,
            created_at=now,
            expires_at=now + 10 * 365 * 86_400,  # until it is over
            num_steps=int(job.params.get("num_inference_steps", 0)),
        )
        submitted: StoredJob = await call(
            self._directory, route.group, lambda: self._router.submit.remote(stored, job.images, job.mask)
        )
        return submitted

    async def get(self, job_id: str, kinds: Sequence[Kind], user: str) -> StoredJob:
        """UnknownJob if there is none of these kinds, or it is another user's."""
        stored = await self._store.get(job_id) if len(job_id) < 100 else None
        if stored is None or stored.kind not in kinds or stored.user != user:
            raise UnknownJob(f"there is no job {job_id[:80]!r}; it was never made, was deleted, or has expired")
        return stored

    async def page(self, kinds: Sequence[Kind], user: str, query: dict[str, str]) -> tuple[list[StoredJob], bool]:
        """A page of the list, and whether there is more behind it."""
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit) <= 100):
            raise RequestError(f"limit: {limit[:80]!r} is no number from 1 to 100", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError(f"order: {order[:80]!r} is neither asc nor desc", param="order")
        after = query.get("after")
        if after is not None:
            await self.get(after, kinds, user)
        found = await self._store.page(kinds, user, int(limit) + 1, after, newest_first=order == "desc")
        return found[: int(limit)], len(found) > int(limit)

    async def cancel(self, job_id: str, kinds: Sequence[Kind], user: str) -> StoredJob:
        stored = await self.get(job_id, kinds, user)
        if stored.is_over:
            return stored
        cancelled: StoredJob | None = await call(
            self._directory, stored.job.group, lambda: self._router.cancel.remote(job_id)
        )
        return cancelled or stored

    async def delete(self, job_id: str, kinds: Sequence[Kind], user: str) -> None:
        stored = await self.get(job_id, kinds, user)
        await call(self._directory, stored.job.group, lambda: self._router.delete.remote(job_id))

    async def content(self, job_id: str, kinds: Sequence[Kind], user: str, index: int = 0) -> tuple[bytes, str]:
        """An output, and its content type."""
        stored = await self.get(job_id, kinds, user)
        if stored.status != "completed":
            raise NotDone(f"{job_id} is {stored.status}; its content is there when it is completed")
        if not 0 <= index < len(stored.media):
            raise UnknownJob(f"index: {job_id} has {len(stored.media)} outputs, and none of number {index}")
        media = stored.media[index]
        kind = "video" if media.format == "mp4" else "image"
        return await self._store.read(job_id, media.file), f"{kind}/{media.format}"

    async def events(self, job_id: str, kinds: Sequence[Kind], user: str) -> AsyncGenerator[bytes, None]:
        """The job's object whenever it changes, until it is over."""
        told = None
        while True:
            stored = await self.get(job_id, kinds, user)
            if stored != told:
                told = stored
                yield sse.event(job_object(stored))
            if stored.is_over:
                return
            await asyncio.sleep(POLL_S)

    async def wait(self, job_id: str, kinds: Sequence[Kind], user: str) -> StoredJob:
        """The job when it is over."""
        while not (stored := await self.get(job_id, kinds, user)).is_over:
            await asyncio.sleep(POLL_S)
        return stored


def job_object(stored: StoredJob) -> dict[str, Any]:
    """The job as ``/v1/jobs`` words it."""
    return {
        "id": stored.id,
        "object": "job",
        "kind": stored.kind,
        "model": stored.job.model,
        "status": stored.status,
        "progress": progress(stored),
        "step": stored.step,
        "num_steps": stored.num_steps,
        "steps_skipped": stored.steps_skipped,
        "queue_position": stored.queue_position,
        "start_s": stored.start_s,
        "seconds_left": stored.seconds_left,
        "created_at": int(stored.created_at),
        "started_at": _whole(stored.started_at),
        "completed_at": _whole(stored.completed_at),
        "expires_at": _whole(stored.expires_at) if stored.is_over else None,
        "num_outputs": stored.job.num_outputs,
        "error": stored.error,
        "omni": stored.usage,
        **stored.request,
    }


def progress(stored: StoredJob) -> int:
    """Percent of the steps that are done; 100 only when all is."""
    if stored.status == "completed":
        return 100
    return min(99, 100 * stored.step // stored.num_steps) if stored.num_steps else 0


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
