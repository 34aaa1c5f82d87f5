"""Applies the parallel axes of the spec to a pipeline."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.hooks import make_hooked, register
from omni_ray.accel.modules import repeated_blocks, transformers_of
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.hooks import plan_hooks
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.paths import expand
from omni_ray.accel.parallel.processor import check_processor, sharded
from omni_ray.accel.parallel.sequence import Sequence
from omni_ray.accel.parallel.tensor import apply_tensor, shard_specs
from omni_ray.config.catalog import FAMILIES, SequencePlan, refusals
from omni_ray.config.spec import DitParallel
from omni_ray.errors import ConfigError


def apply_parallel(pipe: DiffusionPipeline, parallel: DitParallel, mesh: DeviceMesh) -> None:
    """Spread every transformer of ``pipe`` over ``mesh``, a mesh of `build_mesh`: tensor first, then the sequence.

    All ranks of the mesh call it, with the same weights. Raises ConfigError, before anything is changed, where a
    transformer cannot be spread so. The ``cfg`` axis is the engine's.
    """
    if parallel.tensor * parallel.ulysses * parallel.ring == 1:
        return
    transformers = transformers_of(pipe)
    for transformer in transformers.values():
        _check(transformer, parallel)
    for transformer in transformers.values():
        family = FAMILIES[type(transformer).__name__]
        if parallel.tensor > 1 and family.tensor is not None:
            apply_tensor(transformer, family.tensor, mesh["tensor"])
        if parallel.ulysses * parallel.ring > 1 and family.sequence is not None:
            _apply_sequence(transformer, family.sequence, mesh)


def _check(transformer: Any, parallel: DitParallel) -> None:
    name = type(transformer).__name__
    if problems := refusals(name, transformer.config, parallel):
        raise ConfigError("\n".join(problems))
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ConfigError(f"parallel: {name} has fused projections, which cannot be split over ranks; do not fuse them")
    family = FAMILIES[name]
    if parallel.tensor > 1 and family.tensor is not None:
        shard_specs(transformer, family.tensor, parallel.tensor)
    if parallel.ulysses * parallel.ring > 1 and family.sequence is not None:
        for path in family.sequence.attention:
            for attention in expand(transformer, path).values():
                check_processor(attention.processor, name, family.sequence.processors)


def _apply_sequence(transformer: Any, plan: SequencePlan, mesh: DeviceMesh) -> None:
    sequence = Sequence(Ranks.of(mesh, "ring"), Ranks.of(mesh, "ulysses"))
    for path, streams in plan.attention.items():
        joined = ShardedAttention(sequence, streams)
        for attention in expand(transformer, path).values():
            attention.processor = sharded(attention.processor, joined)
    for block in repeated_blocks(transformer):
        make_hooked(block)  # those without hooks too: blocks of one class are compiled once
    for i, (path, hook) in enumerate(reversed(plan_hooks(sequence, plan, transformer))):
        for module in expand(transformer, path).values():
            name = f"sequence {i:02}"
            if module is transformer:  # whose forward is called by its name
                HookRegistry.check_if_exists_or_initialize(module).register_hook(copy.copy(hook), name)
            else:
                register(module, name, copy.copy(hook))
