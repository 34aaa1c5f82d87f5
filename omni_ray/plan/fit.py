"""The largest request that fits beside the weights of a replica that is being loaded."""

from __future__ import annotations

from dataclasses import dataclass

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.inventory import Inventory
from omni_ray.plan.placement import place
from omni_ray.plan.plan import need_of


@dataclass(frozen=True)
class Room:
    """``pixels`` fit in one picture or one frame, ``at_once`` in all pictures and frames of a request together.

    It is what fits with the model's default number of frames: a longer video has to be smaller in proportion.
    """

    pixels: int
    at_once: int


def room_for(group: DitGroup, source: str, inventory: Inventory) -> Room | None:
    """What fits on a GPU of the first node; None where all that the limits allow fits, or nothing is known of the
    checkpoint."""
    node = inventory[0]
    if not node.num_gpus:
        return None
    try:
        need = need_of(group, read_checkpoint(source), node, place(group, has_gpus=True))
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
    if need.safe_pixels is None or need.request is None:
        return None
    return Room(need.safe_pixels, need.safe_pixels * need.request.frames)
