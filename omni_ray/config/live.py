"""What of a group changes while it runs."""

from __future__ import annotations

from pydantic import Field

from omni_ray.config.block import Block, Positive
from omni_ray.config.spec import Queue


class LiveCache(Block):
    """TeaCache's limits."""

    threshold: float | None = Field(None, gt=0, description="See `cache.threshold`.")
    max_consecutive_skips: Positive | None = Field(None, description="See `cache.max_consecutive_skips`.")


class LiveConfig(Block):
    """What of a DiT group changes while it runs: `user_config` of its deployment, and of `Router` by group id."""

    cache: LiveCache | None = Field(None, description="Limits of TeaCache; the group's deployment takes them.")
    queue: Queue | None = Field(None, description="Bound of the queue; the deployment `Router` takes it.")
