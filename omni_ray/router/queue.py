"""The bounded queue in front of a DiT group: first in, first out, as many at once as the group's replicas can hold."""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import AsyncIterator, Callable

from omni_ray.errors import Overloaded
from omni_ray.router.estimate import play_forward
from omni_ray.router.jobs import JobRecord

RETELL_S = 1.0
"""A queued job is told its estimated start this often, even if its place is the same."""

RETURNS_AFTER_S = 2.0
"""A refused client that has not come back so long after its time has lost its turn."""

MOST_RETURNS = 256
"""Refused clients that are reckoned with at once."""


class GroupQueue:
    """``num_replicas`` tells how many there are now, ``places_each`` how many jobs each of them runs at once."""

    def __init__(self, group: str, max_queued: int, num_replicas: Callable[[], int], places_each: int) -> None:
        self._group = group
        self.max_queued = max_queued
        self._num_replicas = num_replicas
        self._places_each = places_each
        self._changed = asyncio.Condition()
        self._returns: list[float] = []  # when the clients that were refused were told to come back, in order
        self.queued: list[JobRecord] = []
        self.running: list[JobRecord] = []

    @property
    def outstanding_s(self) -> float:
        """Device seconds of all work that is queued or running."""
        return sum(record.remaining_s for record in (*self.queued, *self.running))

    @property
    def _num_places(self) -> int:
        return self._num_replicas() * self._places_each

    def estimate_s(self, record: JobRecord) -> tuple[float, float]:
        """Seconds until the job starts (0 if it runs), and until it ends."""
        ends, starts = self._play_forward()
        place = [*self.running, *self.queued].index(record)
        return starts[place - len(self.running)] if place >= len(self.running) else 0.0, ends[place]

    def _play_forward(self, more: int = 0) -> tuple[list[float], list[float]]:
        """With ``more`` jobs behind the queue, each as large as the mean of those that there are."""
        running, queued = ([r.remaining_s for r in jobs] for jobs in (self.running, self.queued))
        mean = sum(r.cost_s for r in (*self.running, *self.queued)) / max(len(running) + len(queued), 1)
        return play_forward(running, [*queued, *[mean] * more], self._num_replicas(), self._num_places)

    def admit(self, record: JobRecord, *, always: bool = False) -> None:
        """Queue the job; Overloaded, with the seconds to wait, if no place in the queue is free but those kept for
        clients who were refused before and are due before this job would start, and not ``always``. Who comes when such
        a client is due is taken to be it."""
        if not always:
            now = time.monotonic()
            self._returns = [each for each in self._returns if each + RETURNS_AFTER_S > now]
            is_due = bool(self._returns) and self._returns[0] <= now
            if is_due:
                self._returns.pop(0)
            num_free = self.max_queued - len(self.queued)
            if num_free <= (0 if is_due else self._num_kept(now)):
                raise self._refusal(now, is_due, num_free)
        self.queued.append(record)

    def _num_kept(self, now: float) -> int:
        """Places for the clients who are due before a job that is queued now would start."""
        if not self._returns:
            return 0
        return bisect.bisect(self._returns, now + self._play_forward(more=1)[1][-1])

    def _refusal(self, now: float, is_due: bool, num_free: int) -> Overloaded:
        """A place in the queue is free when its first job starts; those who were refused before come first. Who is due
        and finds none gets the next one."""
        _, starts = self._play_forward(more=len(self._returns) + 1)
        before = bisect.bisect_left(self._returns, now + starts[0]) if is_due else len(self._returns) - num_free
        wait_s = max(starts[min(max(before, 0), len(starts) - 1)], 1.0)
        if len(self._returns) < MOST_RETURNS:
            bisect.insort(self._returns, now + wait_s)
        return Overloaded(
            f"{self._group} has {len(self.queued)} requests queued and {len(self._returns)} announced, and its "
            f"limit is {self.max_queued}; try again in {wait_s:.0f} s",
            retry_after_s=wait_s,
        )

    async def wait_turn(self, record: JobRecord) -> AsyncIterator[int]:
        """Yield the job's place in the queue (0 is the front) now and then, and at once when it changes; return when
        the job may run."""
        told: tuple[int, float] | None = None
        while (place := self.queued.index(record)) > 0 or len(self.running) >= self._num_places:
            now = time.monotonic()
            if told is None or place != told[0] or now - told[1] >= RETELL_S:
                told = (place, now)
                yield place
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=RETELL_S)
                except TimeoutError:
                    continue  # look again: the number of replicas may have changed
        self.queued.remove(record)
        self.running.append(record)
        await self._notify()

    async def leave(self, record: JobRecord) -> None:
        """The job is over, whether it ran or not."""
        for place in (self.queued, self.running):
            if record in place:
                place.remove(record)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
