"""Applies the caches of the spec to a pipeline's transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from diffusers import DiffusionPipeline

from omni_ray.accel.cache.cache_dit import CacheDit, adapt
from omni_ray.accel.cache.stacks import Stacks
from omni_ray.accel.cache.teacache import TeaCache, curves_of
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.config.catalog import FAMILIES
from omni_ray.config.spec import Cache
from omni_ray.errors import ConfigError

logger = logging.getLogger(__name__)


def apply_cache(
    pipe: DiffusionPipeline, spec: Cache, shards: Sequence[Ranks] = ()
) -> tuple[TeaCache | None, CacheDit | None]:
    """The caches that ``spec`` asks for. With both, TeaCache decides whether Cache-DiT gets to see a step.

    Comes before the parallel axes are applied: what those do to a transformer's forward has to lie around the caches.
    ``shards`` are the ranks of its sequence axes.

    Raises ConfigError where a transformer is of an unknown family.
    """
    transformers = transformers_of(pipe)
    wants_dit, wants_tea = spec.kind in ("cache_dit", "both"), spec.kind in ("teacache", "both")
    adapters = {name: adapt(name, each, spec.cache_dit) for name, each in transformers.items() if wants_dit}
    if wants_tea:
        _check(pipe)
    families = {name: FAMILIES.get(type(transformer).__name__) for name, transformer in transformers.items()}
    stacks = {
        name: Stacks(transformers[name], family.stacks)
        for name, family in families.items()
        if family and family.stacks and (wants_tea or (wants_dit and shards))
    }
    _advise(spec, [name for name, family in families.items() if family and wants_tea and family.has_no_curve])
    tea = TeaCache(stacks, *curves_of(spec, pipe), shards) if wants_tea else None
    return tea, CacheDit(spec.cache_dit, adapters, stacks if shards else {}) if wants_dit else None


def _advise(spec: Cache, without_curve: Sequence[str]) -> None:
    """Say in the log what a user would want to know who sees the images change."""
    if spec.kind == "both":
        logger.warning("cache.kind both: TeaCache and Cache-DiT add up their errors; measure each alone first")
    if without_curve and spec.calibration is None and spec.coefficients is None:
        logger.warning(
            "cache.threshold %g bounds the plain distance of the signal: no polynomial is known for %s; "
            "`omni-ray calibrate` makes one",
            spec.threshold,
            ", ".join(without_curve),
        )


def _check(pipe: DiffusionPipeline) -> None:
    known = sorted(name for name, family in FAMILIES.items() if family.stacks)
    for name, transformer in transformers_of(pipe).items():
        if type(transformer).__name__ not in known:
            raise ConfigError(
                f"cache.kind teacache: {type(transformer).__name__} ({name}) is not among the families that it "
                f"knows: {', '.join(known)}; set kind: none"
            )
