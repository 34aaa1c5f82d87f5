"""The bounded queue in front of a DiT group: first in, first out, as many at once as the group's replicas can hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from omni_ray.errors import Overloaded
from omni_ray.router.jobs import JobRecord
from omni_ray.router.quota import Quotas

RETRY_AFTER_S = (1.0, 60.0)
"""Bounds of the Retry-After that a refused request is told."""


class GroupQueue:
    """``capacity`` tells how many jobs may run now: it changes as replicas come and go. ``quotas`` are those of the API
    keys, which all queues share."""

    def __init__(self, group: str, max_queued: int, capacity: Callable[[], int], quotas: Quotas | None = None) -> None:
        self._group = group
        self._max_queued = max_queued
        self._capacity = capacity
        self._quotas = quotas or Quotas()
        self._changed = asyncio.Condition()
        self.queued: list[JobRecord] = []
        self.running: list[JobRecord] = []

    @property
    def outstanding_s(self) -> float:
        """Device seconds of all work that is queued or running."""
        return sum(record.remaining_s for record in (*self.queued, *self.running))

    def start_s(self, record: JobRecord) -> float:
        """Seconds until the queued job should start: the work before it, shared by the places that there are."""
        before = self.queued[: self.queued.index(record)]
        return sum(r.remaining_s for r in (*before, *self.running)) / max(self._capacity(), 1)

    def admit(self, record: JobRecord) -> None:
        """Queue the job; Overloaded, with the seconds to wait, if the queue is full or its owner over a limit."""
        if len(self.queued) >= self._max_queued:
            wait_s = min(max(self.outstanding_s / max(self._capacity(), 1) / 2, RETRY_AFTER_S[0]), RETRY_AFTER_S[1])
            raise Overloaded(
                f"{self._group} has {len(self.queued)} requests queued, and its limit is {self._max_queued}; "
                f"try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        self._quotas.admit(record)
        self.queued.append(record)

    async def wait_turn(self, record: JobRecord) -> AsyncIterator[int]:
        """Yield the job's place in the queue (0 is the front) whenever it changes; return when the job may run."""
        told: int | None = None
        while (place := self.queued.index(record)) > 0 or len(self.running) >= self._capacity():
            if place != told:
                told = place
                yield place
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue  # look again: the capacity may have changed
        self.queued.remove(record)
        self.running.append(record)
        await self._notify()

    async def leave(self, record: JobRecord) -> None:
        """The job is over, whether it ran or not."""
        self._quotas.leave(record)
        for place in (self.queued, self.running):
            if record in place:
                place.remove(record)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
