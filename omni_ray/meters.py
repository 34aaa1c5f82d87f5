"""What a process measures, for Prometheus: Ray exports it at the node that the process runs on."""

from __future__ import annotations

import functools
from typing import Any

from ray.util import metrics as ray_metrics

from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.metrics import Metric

TELL_INTERVAL_S = 5.0
"""How often a gauge is to be set. Ray drops one that was not set for 20 seconds."""


class Meters:
    """Counts, observes and sets under ``labels``, to which each call adds the others of its metric."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels

    @classmethod
    def of(cls, group: ArGroup | DitGroup) -> Meters:
        return cls(model=group.name, profile=group.profile or "")

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Nothing is counted where ``amount`` is 0."""
        if amount > 0:
            _made(metric).inc(amount, self._labels | labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        _made(metric).observe(value, self._labels | labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        _made(metric).set(value, self._labels | labels)


@functools.cache
def _made(metric: Metric) -> Any:
    """The one object of the metric in this process."""
    name = metric.name.removesuffix("_total")  # Ray adds the suffix of counters itself
    if metric.kind == "counter":
        return ray_metrics.Counter(name, metric.description, metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(name, metric.description, metric.labels)
    return ray_metrics.Histogram(name, metric.description, list(metric.boundaries), metric.labels)
