"""A watcher on every node, so that Ray Serve's own actors are looked after too where no replica runs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from omni_ray.watch import Watcher

logger = logging.getLogger("ray.serve")

INTERVAL_S = 5.0


async def watch_all_nodes() -> None:
    """Keep a `Watcher` on every node but this one, whose processes the caller looks after itself. They end with it."""
    here = ray.get_runtime_context().get_node_id()
    watchers: dict[str, Any] = {}
    while True:
        try:
            nodes = {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]} - {here}
            watchers = {node: watchers.get(node) or _start(node) for node in nodes}
        except Exception as error:
            logger.warning("not every node has a watcher: %s", error)
        await asyncio.sleep(INTERVAL_S)


def _start(node: str) -> Any:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Watcher).options(num_cpus=0, max_restarts=-1, scheduling_strategy=place).remote()
