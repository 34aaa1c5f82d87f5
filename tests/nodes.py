"""A gang on a Ray cluster of two nodes, which are this machine twice: ``python -m tests.nodes`` prints what came of it.

Each node has CPUs for two ranks. A gang of four ranks on two nodes draws a picture; one of two ranks on two nodes does
not come to be, as one node has room for both.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.messages import Job
from omni_ray.plan.placement import place
from omni_ray.sources import resolve_source
from tests.ports import free_port

SMALL = {"object_store_memory": 100 * 2**20, "num_cpus": 2}
SOURCE = "demo:image"


class Owner:
    """In place of the replica."""

    async def draw(self, group: DitGroup) -> dict[str, Any]:
        """The nodes of the ranks in their order, and the kinds of the events of a job."""
        from omni_ray.engine.gang import Gang

        try:
            gang = Gang(group, resolve_source(SOURCE), 0, "replica")
        except ConfigError as error:
            return {"error": error.message}
        try:
            async for _ in gang.load():
                pass
            nodes = await asyncio.gather(*(rank.node.remote() for rank in gang._ranks))
            params = {"prompt": "a red circle", "num_inference_steps": 2}
            job = Job(id="job", model="m", group="m", params=params, seed=1)
            events = [type(event).__name__ async for event in gang.run(job)]
            return {"nodes": nodes, "events": events}
        finally:
            gang.kill()


def draw(group: DitGroup) -> dict[str, Any]:
    placement = place(group, has_gpus=False)
    bundles = placement_group(placement.bundles, strategy=placement.strategy)
    ray.get(bundles.ready(), timeout=60)
    owner = ray.remote(Owner).options(num_cpus=0, scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, 0))
    drawn: dict[str, Any] = ray.get(owner.remote().draw.remote(group), timeout=240)
    remove_placement_group(bundles)
    return drawn


def group_of(**parallel: int) -> DitGroup:
    fields = {"name": "m", "type": "dit", "source": SOURCE, "num_cpus": 1, "parallel": parallel}
    return DitGroup.model_validate(fields)


def main() -> None:
    head = {"redis_port": free_port(), "include_dashboard": False, **SMALL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**SMALL)
        ray.init(address=cluster.address, log_to_driver=False)
        spread = draw(group_of(ulysses=2, cfg=2, num_nodes=2))
        packed = draw(group_of(ulysses=2, num_nodes=2))
        print(json.dumps({"spread": spread, "packed": packed}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
