"""One setting of the levers on one model."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from omni_ray.config.spec import DitGroup
from omni_ray.messages import Job
from omni_ray.tuning.gang import measure_gang
from omni_ray.tuning.measured import Measured, measured
from omni_ray.tuning.run import in_a_thread, prepare

Levers = dict[str, Any]
"""Blocks of a group."""


def measure(group: DitGroup, levers: Levers, jobs: Sequence[Job]) -> Measured:
    """Load the group's model anew with ``levers``, on as many ranks as they say, and run the jobs side by side.

    Raises ConfigError (or a validation error) where the model or the machine cannot do it.
    """
    gc.collect()  # the model before is in cycles with its hooks
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    changed = DitGroup.model_validate(group.model_dump(exclude_unset=True) | levers)
    if changed.parallel.num_ranks > 1:
        return measure_gang(changed, jobs)
    pipe, accelerators = in_a_thread(prepare, changed)
    return measured(pipe, changed.batching, jobs, accelerators)
