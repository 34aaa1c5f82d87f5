"""When it is saved what a lane carries, so that another one can go on with the request if its replica dies."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from omni_ray.engine.replay import Carried, save
from omni_ray.messages import Snapshot

SNAPSHOT_S = 0.25
"""Seconds between two snapshots of a lane, at least: what may be lost of a request whose replica dies."""

When = Literal["after any step", "before computed steps", "never"]
"""``before computed steps`` is for TeaCache, what it keeps of a request being large. A lane that goes on has an empty
cache, and so computes its first step; the one before it computed that step too, and kept of it what all later decisions
and answers rest on."""

logger = logging.getLogger(__name__)
_savers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")


class Snapshots:
    """Those of one lane, which ``tell`` gets."""

    def __init__(self, job_id: str, when: When, carried: Carried, tell: Callable[[Snapshot], None]) -> None:
        self._job_id = job_id
        self._when = when
        self._carried = carried
        self._tell = tell
        self._told_at = math.inf if when == "never" else time.perf_counter()
        self._before: Callable[[], bytes] | None = None
        """What was saved after the step before."""

    def stop(self) -> None:
        self._told_at, self._before = math.inf, None

    def stepped(self, step: int, steps_skipped: int, sample: torch.Tensor, *, is_computed: bool) -> None:
        """The lane made its ``step``-th step, which gave ``sample``, wholly ``is_computed`` or not."""
        if self._before is not None and is_computed:
            self._submit(step - 1, self._before)
        self._before = None
        if time.perf_counter() <= self._told_at + SNAPSHOT_S:
            return
        data = save(step, steps_skipped, sample, self._carried)
        if self._when == "after any step":
            self._submit(step, data)
        else:
            self._before = data

    def _submit(self, step: int, data: Callable[[], bytes]) -> None:
        self._told_at = time.perf_counter()
        _savers.submit(self._save, step, data)

    def _save(self, step: int, data: Callable[[], bytes]) -> None:
        try:
            self._tell(Snapshot(job_id=self._job_id, step=step, data=data()))
        except Exception as error:
            logger.warning("%s cannot be gone on with after step %d", self._job_id, step, exc_info=error)
