"""What each API key has asked for and not yet got. It is kept in the router, which is one for all ingress replicas."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque

from omni_ray.errors import OverLimit
from omni_ray.router.jobs import JobRecord

WINDOW_S = 60.0
RETRY_AFTER_S = (1.0, 60.0)
"""Bounds of the Retry-After that a job over its limit is told."""


class Quotas:
    """Requests of the last minute and unfinished jobs, by the name of the key."""

    def __init__(self) -> None:
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._held: defaultdict[str, dict[str, JobRecord]] = defaultdict(dict)

    def count(self, key: str, requests_per_minute: int) -> None:
        """Count a request. OverLimit, and nothing counted, if the key has made so many in the last 60 seconds."""
        now, times = time.monotonic(), self._times[key]
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= requests_per_minute:
            wait_s = times[len(times) - requests_per_minute] + WINDOW_S - now
            raise OverLimit(
                f"the API key {key!r} has made {len(times)} requests in the last minute, and its limit "
                f"requests_per_minute is {requests_per_minute}; try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        times.append(now)

    def admit(self, record: JobRecord, *, always: bool = False) -> None:
        """Hold the job until `leave`. OverLimit if its owner's jobs would need more device seconds than they may, and
        not ``always``.

        The first job of an owner always passes: what a job costs is an estimate, and the first ones of a group are what
        it learns from.
        """
        owner = record.job.owner
        if owner is None:
            return
        held = self._held[owner.key]
        outstanding_s = sum(each.remaining_s for each in held.values())
        bound_s = math.inf if always or not held or owner.outstanding_s is None else owner.outstanding_s
        surplus_s = outstanding_s + record.remaining_s - bound_s
        if surplus_s > 0:
            wait_s = min(max(surplus_s, RETRY_AFTER_S[0]), RETRY_AFTER_S[1])
            raise OverLimit(
                f"the API key {owner.key!r} has {len(held)} unfinished jobs of {outstanding_s:.1f} s, this one would "
                f"need {record.remaining_s:.1f} s, and its limit outstanding_s is {bound_s:g}; try again "
                f"in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        held[record.job.id] = record

    def leave(self, record: JobRecord) -> None:
        """The job is over, or was never admitted."""
        owner = record.job.owner
        if owner is not None:
            self._held[owner.key].pop(record.job.id, None)
