"""Applies the parallel axes of the spec to a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import _get_submodule_by_name
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.sequence import GatherHook, Sequence, SplitHook, diffusers_plan
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
    family = FAMILIES[name]
    if parallel.tensor > 1 and family.tensor is not None:
        shard_specs(transformer, family.tensor, parallel.tensor)
    if parallel.ulysses * parallel.ring > 1 and family.sequence is not None:
        for path in family.sequence.attention:
            for attention in _submodules(transformer, path):
                _check_backend(attention.processor, name)


def _check_backend(processor: Any, transformer: str) -> None:
    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    if not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(backend)):
        usable = ", ".join(sorted(_AttentionBackendRegistry._supports_context_parallel))
        raise ConfigError(
            f"attention.backend {AttentionBackendName(backend).value!r} of {transformer} cannot run on parts of a "
            f"sequence; with ulysses or ring, use one of {usable}"
        )


def _apply_sequence(transformer: torch.nn.Module, plan: SequencePlan, mesh: DeviceMesh) -> None:
    sequence = Sequence(Ranks.of(mesh, "ring"), Ranks.of(mesh, "ulysses"))
    for path, streams in plan.attention.items():
        for attention in _submodules(transformer, path):
            processor = copy.copy(attention.processor)  # blocks may share one
            processor._parallel_config = ShardedAttention(sequence, streams)
            attention.processor = processor
    for path, step in diffusers_plan(plan, transformer).items():
        for module in _submodules(transformer, path):
            hook = (
                SplitHook(step, sequence, plan.optional)
                if isinstance(step, dict)
                else GatherHook(step.gather_dim, sequence)
            )
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, f"{type(hook).__name__}.{path}")


def _submodules(transformer: torch.nn.Module, path: str) -> list[Any]:
    found = _get_submodule_by_name(transformer, path)
    return found if isinstance(found, list) else [found]
