"""A gang: the ranks of one replica, one Ray actor per device, in its placement group, living and dying as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from omni_ray.config.spec import DitGroup
from omni_ray.engine.rank import Rank
from omni_ray.errors import Unavailable
from omni_ray.messages import Capabilities, Event, Job, LoadProgress
from omni_ray.plan.placement import rank_order

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 3.0
"""A rank that has not answered for so long is stuck, and its gang with it."""


class Gang:
    """Starts ``group.parallel.num_ranks`` actors, one per bundle of the current placement group.

    Ranks that follow each other share a node wherever they can, so that the innermost axis of the mesh, which talks
    most, stays inside one. Raises ConfigError where Ray did not spread the bundles over ``group.parallel.num_nodes``.
    """

    def __init__(self, group: DitGroup, source: str, num_gpus: float, replica_id: str) -> None:
        placement = get_current_placement_group()
        nodes = placement_group_table(placement)["bundles_to_node_id"]
        self._ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=group.num_cpus,
                num_gpus=num_gpus,
                max_concurrency=1000,  # a ping must never wait for requests that still unwind
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle),
            )
            .remote(group, source, index, replica_id)
            for index, bundle in enumerate(rank_order(nodes, group.parallel, group.id))
        ]

    @property
    def _leader(self) -> Any:
        return self._ranks[0]

    async def load(self) -> AsyncIterator[LoadProgress | Capabilities]:
        """Load the pipeline on all ranks. Yields the first one's progress, and last what the pipeline accepts.

        Raises what the first rank to fail raised.
        """
        address = await self._leader.meet.remote() if len(self._ranks) > 1 else None
        leader, *others = [rank.load.options(num_returns="streaming").remote(address) for rank in self._ranks]
        following = [asyncio.ensure_future(_exhaust(stream)) for stream in others]
        steps, capabilities = leader.__aiter__(), None
        while (step := await _first(_next(steps), following)) is not None:
            if isinstance(step, Capabilities):
                capabilities = step
            else:
                yield step
        await asyncio.gather(*following)
        assert capabilities is not None
        yield capabilities

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events. Closing the iterator cancels the job on the ranks within one denoise step."""
        try:
            async for event in self._leader.run.options(num_returns="streaming").remote(job):
                yield await event
        finally:
            self._leader.cancel.remote(job.id)

    async def set_cache(self, threshold: float | None, max_consecutive_skips: int | None) -> None:
        """Change TeaCache's limits from the next step on; what is None stays. ConfigError if the group has none."""
        await asyncio.gather(*(rank.set_cache.remote(threshold, max_consecutive_skips) for rank in self._ranks))

    async def join(self) -> None:
        """Wait until the gang ends: returns or raises as soon as one rank has stopped, died or got stuck.

        :raises RayActorError: a rank died.
        :raises Unavailable: a rank does not answer any more.
        """
        watches = [asyncio.ensure_future(watch) for rank in self._ranks for watch in (_joined(rank), _answers(rank))]
        done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        for watch in done:
            watch.result()

    def kill(self) -> None:
        """End every rank's process at once, whatever it is doing."""
        for rank in self._ranks:
            ray.kill(rank)


async def _joined(rank: Any) -> None:
    await rank.join.remote()


async def _answers(rank: Any) -> None:
    """Ask the rank again and again whether it lives; raises once it gives no answer."""
    while True:
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(rank.ping.remote())), PING_TIMEOUT_S)
        except TimeoutError as error:
            raise Unavailable(f"a rank has not answered for {PING_TIMEOUT_S:.0f} s") from error
        await asyncio.sleep(PING_INTERVAL_S)


async def _exhaust(stream: Any) -> None:
    async for item in stream:
        await item


async def _next(steps: AsyncIterator[Any]) -> Any:
    """The next item of a stream of references, None at its end."""
    async for reference in steps:
        return await reference
    return None


async def _first(step: Any, following: Sequence[asyncio.Future[None]]) -> Any:
    """The result of ``step``, unless one of ``following`` fails before."""
    wanted = asyncio.ensure_future(step)
    waiting = {wanted, *(future for future in following if not future.done())}
    while not wanted.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            future.result()
    return wanted.result()
