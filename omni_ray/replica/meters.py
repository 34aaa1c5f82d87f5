"""Counts what a DiT replica's jobs cost, for Prometheus."""

from __future__ import annotations

from typing import Any

from ray.util import metrics as ray_metrics

from omni_ray import metrics
from omni_ray.config.spec import DitGroup
from omni_ray.errors import Cancelled
from omni_ray.messages import Event, Failure, Usage


class Meters:
    """One per replica. The series of its replicas are summed by the labels."""

    def __init__(self, group: DitGroup) -> None:
        self._labels = {"model": group.name, "profile": group.profile or ""}
        self._made = {metric.name: _make(metric) for metric in metrics.METRICS}

    def record(self, last: Event | None) -> None:
        """Count a job by its last event. One that ended in the middle was closed by the client, or lost its rank."""
        if isinstance(last, Failure):
            outcome = "cancelled" if isinstance(last.error, Cancelled) else "failed"
            self._count(metrics.JOBS, 1, outcome=outcome)
        elif not isinstance(last, Usage):
            self._count(metrics.JOBS, 1, outcome="left")
        else:
            self._count(metrics.JOBS, 1, outcome="done")
            self._count(metrics.STEPS, last.steps_computed, cache=last.cache, result="computed")
            self._count(metrics.STEPS, last.steps_skipped, cache=last.cache, result="skipped")
            self._count(metrics.DEVICE_S, last.device_s)
            self._count(metrics.OFFLOAD_S, last.offload_hidden_s, kind="hidden")
            self._count(metrics.OFFLOAD_S, last.offload_paid_s, kind="paid")
            self._made[metrics.RUN_S.name].observe(last.run_s, self._labels)
            self._made[metrics.QUEUE_S.name].observe(last.queue_s, self._labels)
            self._made[metrics.PEAK_GIB.name].set(last.peak_memory_gib, self._labels)

    def _count(self, metric: metrics.Metric, amount: float, **labels: str) -> None:
        if amount > 0:
            self._made[metric.name].inc(amount, self._labels | labels)


def _make(metric: metrics.Metric) -> Any:
    # Ray adds the suffix of counters itself.
    name = metric.name.removesuffix("_total")
    if metric.kind == "counter":
        return ray_metrics.Counter(name, metric.description, metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(name, metric.description, metric.labels)
    return ray_metrics.Histogram(name, metric.description, list(metric.boundaries), metric.labels)
