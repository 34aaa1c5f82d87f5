"""Applies the parallel axes of the spec to a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.hooks import plan_hooks
from omni_ray.accel.parallel.joint import JointAttention
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.paths import expand
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
                _check_processor(attention.processor, name, family.sequence.processors)


def _check_processor(processor: Any, transformer: str, processors: tuple[str, ...]) -> None:
    if type(processor).__name__ not in processors:
        raise ConfigError(
            f"parallel: an attention of {transformer} has the processor {type(processor).__name__}, which cannot run "
            f"on parts of a sequence, unlike {', '.join(processors)}; set ulysses: 1 and ring: 1"
        )
    backend = getattr(processor, "_attention_backend", None) or _AttentionBackendRegistry.get_active_backend()[0]
    if not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(backend)):
        usable = ", ".join(sorted(_AttentionBackendRegistry._supports_context_parallel))
        raise ConfigError(
            f"attention.backend {AttentionBackendName(backend).value!r} of {transformer} cannot run on parts of a "
            f"sequence; with ulysses or ring, use one of {usable}"
        )


def _apply_sequence(transformer: torch.nn.Module, plan: SequencePlan, mesh: DeviceMesh) -> None:
    sequence = Sequence(Ranks.of(mesh, "ring"), Ranks.of(mesh, "ulysses"))
    for path, streams in plan.attention.items():
        for attention in expand(transformer, path).values():
            attention.processor = _sharded(attention.processor, ShardedAttention(sequence, streams))
    for path, hook in plan_hooks(sequence, plan, transformer):  # a hook serves one module, so each has its copy
        for module in expand(transformer, path).values():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(
                copy.copy(hook), f"{type(hook).__name__}.{path}"
            )


def _sharded(processor: Any, attention: ShardedAttention) -> Any:
    """A processor like this one that computes ``attention``. A new one, for the modules may share one."""
    if type(processor).__name__ == "JointAttnProcessor2_0":
        processor = JointAttention()
    processor = copy.copy(processor)
    processor._parallel_config = attention
    return processor
