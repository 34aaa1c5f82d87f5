"""Tells how every group fares, for Prometheus: queue, seconds outstanding, replicas, load phase."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import get_args

from omni_ray import metrics
from omni_ray.config.spec import OmniSpec
from omni_ray.messages import GroupStatus, LoadPhase
from omni_ray.meters import TELL_INTERVAL_S, Meters

logger = logging.getLogger("ray.serve")


async def tell_forever(spec: OmniSpec, status: Callable[[], Awaitable[tuple[GroupStatus, ...]]]) -> None:
    """Set the gauges of all groups of ``spec`` from ``status``, again and again."""
    meters = {group.id: Meters.of(group) for group in spec.groups}
    while True:
        try:
            for group in await status():
                _tell(meters[group.group], group)
        except Exception as error:
            logger.warning("no metrics of the groups: %s", error)
        await asyncio.sleep(TELL_INTERVAL_S)


def _tell(meters: Meters, group: GroupStatus) -> None:
    meters.set(metrics.READY, group.ready)
    meters.set(metrics.QUEUED, group.num_queued)
    meters.set(metrics.RUNNING, group.num_running)
    meters.set(metrics.OUTSTANDING_S, group.outstanding_s)
    for state, num in group.replicas.items():
        meters.set(metrics.REPLICAS, num, state=state)
    if group.progress:
        for phase in get_args(LoadPhase):
            meters.set(metrics.LOAD_PHASE, phase == group.progress[-1].phase, phase=phase)
