"""When queued jobs will start and running ones end: the queue played forward.

A replica's device does one second of work a second, shared evenly by the jobs that run on it. A job starts when a place
is free, and the first in the queue takes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def play_forward(
    running: Sequence[float], queued: Sequence[float], num_replicas: int, num_places: int
) -> tuple[list[float], list[float]]:
    """Seconds until each job ends, the running ones first, and seconds until each queued one starts.

    Args:
        running: seconds of device time that each running job still needs.
        queued: the same of the queued ones, first in line first.
        num_replicas: devices that work at once; a job never goes faster than one device.
        num_places: jobs that run at once.
    """
    now, done_each = 0.0, 0.0  # seconds, and device time that every running job has had so far
    active = [(left, i) for i, left in enumerate(running)]
    heapq.heapify(active)
    ends, starts = [0.0] * (len(running) + len(queued)), [0.0] * len(queued)
    next_queued = 0
    while active or next_queued < len(queued):
        while next_queued < len(queued) and len(active) < max(num_places, 1):
            starts[next_queued] = now
            heapq.heappush(active, (done_each + queued[next_queued], len(running) + next_queued))
            next_queued += 1
        until, job = heapq.heappop(active)
        speed = min(1.0, max(num_replicas, 1) / (len(active) + 1))
        now, done_each = now + max(until - done_each, 0.0) / speed, max(until, done_each)
        ends[job] = now
    return ends, starts
