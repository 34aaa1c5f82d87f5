"""The largest request that fits beside the weights of a replica that is being loaded."""

from __future__ import annotations

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.messages import Room
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.inventory import Inventory
from omni_ray.plan.placement import place
from omni_ray.plan.plan import need_of


def room_for(group: DitGroup, source: str, inventory: Inventory) -> Room | None:
    """What fits on a GPU of the first node; None where all that the limits allow fits, or nothing is known of the
    checkpoint."""
    node = inventory[0]
    if not node.num_gpus:
        return None
    try:
        return need_of(group, read_checkpoint(source), node, place(group, has_gpus=True)).room
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
