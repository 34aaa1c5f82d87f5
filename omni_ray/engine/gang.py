"""A gang: the ranks of one replica, one Ray actor per device, in its placement group, living and dying as one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from omni_ray.config.spec import DitGroup
from omni_ray.engine.rank import Rank
from omni_ray.messages import Capabilities, Event, Job, LoadProgress


class Gang:
    """Starts ``group.parallel.num_ranks`` actors. Rank i takes bundle i of the current placement group."""

    def __init__(self, group: DitGroup, source: str, num_gpus: float, replica_id: str) -> None:
        bundles = get_current_placement_group()
        self._ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=group.num_cpus,
                num_gpus=num_gpus,
                max_concurrency=group.batching.max_num_seqs + 16,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=index),
            )
            .remote(group, source, index, replica_id)
            for index in range(group.parallel.num_ranks)
        ]

    @property
    def _leader(self) -> Any:
        return self._ranks[0]

    async def load(self) -> AsyncIterator[LoadProgress | Capabilities]:
        """Load the pipeline. Yields progress, and last what the pipeline accepts."""
        async for item in self._leader.load.options(num_returns="streaming").remote():
            yield await item

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events. Closing the iterator cancels the job on the ranks within one denoise step."""
        try:
            async for event in self._leader.run.options(num_returns="streaming").remote(job):
                yield await event
        finally:
            self._leader.cancel.remote(job.id)

    async def join(self) -> None:
        """Wait until the gang ends; raises RayActorError as soon as a rank has died."""
        await self._leader.join.remote()
