"""Measures the forwards of a rank and the memory of its GPU, for Prometheus."""

from __future__ import annotations

import asyncio

from omni_ray import metrics
from omni_ray.config.spec import DitGroup
from omni_ray.meters import TELL_INTERVAL_S, Meters


class RankMeters:
    """One per rank. Of the forwards, which all ranks of a gang share, the first one tells."""

    def __init__(self, group: DitGroup, replica_id: str, index: int) -> None:
        self._meters = Meters.of(group)
        self._labels = {"replica": replica_id, "rank": str(index)}
        self._leads = index == 0
        self._peak_bytes = 0

    def forward(self, component: str, num_calls: int, seconds: float, peak_bytes: int) -> None:
        """The engine's clock calls this for each forward (``engine.clock.OnForward``)."""
        self._peak_bytes = max(self._peak_bytes, peak_bytes)
        if self._leads:
            self._meters.observe(metrics.FORWARD_S, seconds, component=component)
            self._meters.observe(metrics.BATCH_SIZE, num_calls, component=component)
            self._meters.count(metrics.CALLS, num_calls, component=component)

    async def tell_memory_forever(self) -> None:
        """Only where there is a GPU."""
        import torch  # here, since the process that owns the gang imports this module and needs no torch

        while True:
            allocated, peak, self._peak_bytes = torch.cuda.memory_allocated(), self._peak_bytes, 0
            told = {
                "allocated": allocated,
                "reserved": torch.cuda.memory_reserved(),
                "peak": max(allocated, peak),
                "total": torch.cuda.mem_get_info()[1],
            }
            for kind, num_bytes in told.items():
                self._meters.set(metrics.MEMORY, num_bytes, kind=kind, **self._labels)
            await asyncio.sleep(TELL_INTERVAL_S)
