"""Applies the accelerators of a group to its loaded pipeline, in the one order in which they work together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.attention import apply_attention
from omni_ray.accel.cache.apply import apply_cache
from omni_ray.accel.cache.cache_dit import CacheDit
from omni_ray.accel.cache.teacache import TeaCache
from omni_ray.accel.compile import apply_compile
from omni_ray.accel.graphs import apply_cuda_graphs
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.offload import Offload, apply_offload
from omni_ray.accel.parallel import apply_parallel, split_decode
from omni_ray.accel.parallel.mesh import Ranks, group_of, parts_of
from omni_ray.accel.projections import fuse_projections
from omni_ray.accel.quantize import apply_quantization
from omni_ray.accel.vae import apply_vae
from omni_ray.config.spec import DitGroup


@dataclass(frozen=True)
class Accelerators:
    """What the engine has to know of the accelerators.

    ``alone`` are the transformers that compute one request at a time, for its cache's sake; ``warnings`` tell what was
    asked for and could not be done.
    """

    teacache: TeaCache | None = None
    cache_dit: CacheDit | None = None
    offload: Offload | None = None
    alone: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def accelerate(
    pipe: DiffusionPipeline,
    group: DitGroup,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    read_parts: Callable[[Ranks], None] = lambda ranks: None,
) -> Accelerators:
    """Change the modules of ``pipe`` as ``group`` says. ``mesh`` is None on a replica of one rank.

    ``read_parts`` reads what this rank keeps of the transformers, once they are cut.

    Raises ConfigError where the pipeline or the device cannot do what the group asks.
    """
    apply_vae(pipe, group.vae)
    warnings = apply_attention(pipe, group.attention, device, pipe.dtype)
    shards = [Ranks.of(mesh, dim) for dim in ("ring", "ulysses") if getattr(group.parallel, dim) > 1] if mesh else []
    teacache, cache_dit = apply_cache(pipe, group.cache, shards)
    if mesh is not None:
        if cache_dit is not None:
            cache_dit.compare_within(group_of(parts_of(mesh)))
        apply_parallel(pipe, group.parallel, mesh)
        if group.parallel.vae == "auto":
            split_decode(pipe)
        read_parts(Ranks.of(mesh, "tensor"))
    fuse_projections(pipe, group.attention)
    warnings += apply_quantization(pipe, group.quantization, device)
    offload = apply_offload(pipe, group.offload, device)
    sums_over_gloo = (
        mesh is not None
        and device.type == "cuda"
        and group.parallel.tensor > 1
        and dist.get_backend(mesh.get_group("tensor")) == "gloo"
    )
    warnings += apply_compile(pipe, group.compile, device, sums_over_gloo=sums_over_gloo)
    apply_cuda_graphs(pipe, group, device)
    # Cache-DiT decides for a whole batch. On a sequence axis, which tokens a rank has depends on the longest request in
    # the batch, and what was kept of them would not be theirs.
    alone = tuple(transformers_of(pipe)) if cache_dit or (teacache and shards) else ()
    return Accelerators(teacache, cache_dit, offload, alone, tuple(warnings))
