"""The state of a DiT job, from admission to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from omni_ray.messages import Job, Snapshot

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(slots=True)
class JobRecord:
    """``cost_s`` is the estimate of the whole job in device seconds; ``progress`` goes from 0 to 1. A further attempt
    goes on from ``resume``."""

    job: Job
    cost_s: float
    resume: Snapshot | None = None
    state: State = "queued"
    progress: float = 0.0
    num_steps: int = 1
    attempts: int = 0
    created: float = field(default_factory=time.monotonic)

    @property
    def remaining_s(self) -> float:
        return self.cost_s * (1.0 - self.progress)
