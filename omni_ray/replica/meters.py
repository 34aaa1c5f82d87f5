"""Counts what a DiT replica's jobs cost, for Prometheus."""

from __future__ import annotations

import time

from omni_ray import metrics
from omni_ray.config.spec import DitGroup
from omni_ray.errors import Cancelled
from omni_ray.messages import Event, Failure, StepEvent, Usage
from omni_ray.meters import Meters


class JobMeter:
    """One per job: :meth:`see` is told its events, and :meth:`end` that there come no more."""

    def __init__(self, group: DitGroup) -> None:
        self._meters = Meters.of(group)
        self._cache = group.cache.kind
        self._last: Event | None = None
        self._last_step: float | None = None
        self._device_s = 0.0

    def see(self, event: Event) -> None:
        self._last = event
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, Usage):
            self._cost(event)

    def _step(self, event: StepEvent) -> None:
        now, before = time.perf_counter(), self._last_step
        labels = {"cache": self._cache, "result": "computed" if event.computed else "skipped"}
        self._meters.count(metrics.STEPS, 1, **labels)
        if before is not None:
            self._meters.observe(metrics.STEP_S, now - before, **labels)
        self._last_step = now
        self._meters.count(metrics.DEVICE_S, event.seconds)
        self._device_s += event.seconds

    def _cost(self, usage: Usage) -> None:
        self._meters.count(metrics.DEVICE_S, usage.device_s - self._device_s)
        self._meters.count(metrics.OFFLOAD_S, usage.offload_hidden_s, kind="hidden")
        self._meters.count(metrics.OFFLOAD_S, usage.offload_paid_s, kind="paid")
        self._meters.observe(metrics.RUN_S, usage.run_s)
        self._meters.observe(metrics.QUEUE_S, usage.queue_s, hop="replica")

    def end(self) -> None:
        """A job that ended in the middle was closed by the client, or lost its rank."""
        outcome = "left"
        if isinstance(self._last, Failure):
            outcome = "cancelled" if isinstance(self._last.error, Cancelled) else "failed"
        elif isinstance(self._last, Usage):
            outcome = "done"
        self._meters.count(metrics.JOBS, outcome=outcome)
