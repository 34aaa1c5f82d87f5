"""Every metric of ours: name, kind, unit and labels. vLLM's, Ray's and Serve's stand beside them under their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """``name`` as Prometheus shows it behind Ray's prefix ``ray_``; it ends in its unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


GROUP = ("model", "profile")
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)

JOBS = Metric("omni_ray_jobs_total", "counter", "Jobs that ended, by how.", (*GROUP, "outcome"))
STEPS = Metric(
    "omni_ray_steps_total", "counter", "Denoise steps, computed or skipped by a cache.", (*GROUP, "cache", "result")
)
DEVICE_S = Metric("omni_ray_device_seconds_total", "counter", "Device time of jobs.", GROUP)
OFFLOAD_S = Metric(
    "omni_ray_offload_seconds_total",
    "counter",
    "Copying of offloaded weights to the device: hidden by computation, or paid, that is waited for.",
    (*GROUP, "kind"),
)
RUN_S = Metric("omni_ray_run_seconds", "histogram", "Time of a job from its first step on.", GROUP, SECONDS)
QUEUE_S = Metric("omni_ray_queue_seconds", "histogram", "Time that a job waited in its replica.", GROUP, SECONDS)
PEAK_GIB = Metric("omni_ray_peak_memory_gib", "gauge", "Most device memory during the last job.", GROUP)

METRICS = (JOBS, STEPS, DEVICE_S, OFFLOAD_S, RUN_S, QUEUE_S, PEAK_GIB)
