"""The largest request that fits beside the weights of a replica that is being loaded."""

from __future__ import annotations

import logging

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.inventory import Inventory
from omni_ray.plan.placement import place
from omni_ray.plan.plan import need_of

logger = logging.getLogger(__name__)


def safe_pixels(group: DitGroup, source: str, inventory: Inventory) -> int | None:
    """Pixels of all images of the largest request that fits on a GPU of the first node; None where all that the limits
    allow fits, or nothing is known of the checkpoint."""
    node = inventory[0]
    if not node.num_gpus:
        return None
    try:
        need = need_of(group, read_checkpoint(source), node, place(group, has_gpus=True))
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
    if need.safe_pixels == 0:
        logger.warning("%s: limits allow %s, which does not fit; lower limits.max_frames", group.id, need.largest)
    return need.safe_pixels or None
