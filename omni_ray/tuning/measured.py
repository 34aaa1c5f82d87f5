"""What a setting did to a set of requests: how fast, how much memory, and which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni_ray.accel.apply import Accelerators
from omni_ray.config.spec import Batching
from omni_ray.messages import Job
from omni_ray.tuning.run import run

NUM_WARM_UPS = 8
NUM_RUNS = 2
"""The one that warms up, and the one that counts."""


@dataclass(frozen=True)
class Measured:
    """``seconds`` for all ``images``; the seconds of offload are per image, ``skipped`` is the share of the steps."""

    seconds: float
    images: list[Any]
    skipped: float
    peak_memory_gib: float
    offload_hidden_s: float
    offload_paid_s: float
    warnings: tuple[str, ...]


def measured(
    pipe: Any, batching: Batching, jobs: Sequence[Job], accelerators: Accelerators, **loop_options: Any
) -> Measured:
    """Warm up, and run the jobs side by side."""
    options = {"accelerators": accelerators, **loop_options}
    run(pipe, jobs[:NUM_WARM_UPS], batching, **options)
    seconds, images, usages = run(pipe, jobs, batching, **options)
    steps = sum(usage.steps_skipped + usage.steps_computed for usage in usages)
    return Measured(
        seconds,
        images,
        sum(usage.steps_skipped for usage in usages) / steps,
        max(usage.peak_memory_gib for usage in usages),
        sum(usage.offload_hidden_s for usage in usages) / len(jobs),
        sum(usage.offload_paid_s for usage in usages) / len(jobs),
        accelerators.warnings,
    )
