"""One setting of the levers on one model: how fast, how much memory, and which images."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_ray.accel.apply import Accelerators, accelerate
from omni_ray.config.spec import DitGroup
from omni_ray.messages import Job
from omni_ray.tuning.run import device_and_dtype, in_a_thread, load, run

Levers = dict[str, Any]
"""Blocks of a group."""

NUM_WARM_UPS = 8


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


def measure(group: DitGroup, levers: Levers, jobs: Sequence[Job]) -> Measured:
    """Load the group's model anew with ``levers``, warm up, and run the jobs side by side.

    Raises ConfigError (or a validation error) where the model or the machine cannot do it.
    """
    gc.collect()  # the model before is in cycles with its hooks
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    changed = DitGroup.model_validate(group.model_dump(exclude_unset=True) | levers)
    pipe, accelerators = in_a_thread(_prepare, changed)
    run(pipe, jobs[:NUM_WARM_UPS], changed.batching, accelerators=accelerators)
    seconds, images, usages = run(pipe, jobs, changed.batching, accelerators=accelerators)
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


def _prepare(group: DitGroup) -> tuple[Any, Accelerators]:
    pipe = load(group)
    return pipe, accelerate(pipe, group, device_and_dtype()[0])
