"""The device mesh of a gang, and what one rank must know of one of its dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from omni_ray.config.spec import DitParallel
from omni_ray.errors import ConfigError

# The newer name of the same function; PyTorch before 2.13 has the older one only.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

DIMS = ("cfg", "ring", "ulysses", "tensor")
"""Outermost first: tensor-parallel ranks talk most, so they are neighbours."""


def build_mesh(parallel: DitParallel, device_type: str) -> DeviceMesh:
    """The mesh with the dimensions `DIMS`; every rank of the default process group calls it, after that is there.

    Raises ConfigError where the ranks of the process group are not as many as those of the spec.
    """
    num_ranks = dist.get_world_size()
    if num_ranks != parallel.num_ranks:
        raise ConfigError(
            f"parallel: cfg {parallel.cfg} x ring {parallel.ring} x ulysses {parallel.ulysses} x tensor "
            f"{parallel.tensor} = {parallel.num_ranks} ranks, but the process group has {num_ranks}; start as many"
        )
    return init_device_mesh(
        device_type,
        tuple(getattr(parallel, dim) for dim in DIMS),
        mesh_dim_names=DIMS,
        # Without the name, a CUDA mesh over gloo may make NCCL groups, which want a GPU for each rank.
        backend_override=dict.fromkeys(DIMS, dist.get_backend()),
    )


def parts_of(mesh: DeviceMesh) -> list[list[int]]:
    """The ranks of each part of the ``cfg`` axis: those that compute the same calls."""
    dim = list(mesh.mesh_dim_names or ()).index("cfg")
    parts: list[list[int]] = mesh.mesh.movedim(dim, 0).flatten(1).tolist()
    return parts


def group_of(cells: list[list[int]], backend: str | None = None) -> dist.ProcessGroup:
    """The process group of this rank's cell, over ``backend`` or that of all ranks. All ranks make all groups, as torch
    wants it."""
    groups: list[dist.ProcessGroup] = [dist.new_group(cell, backend=backend) for cell in cells]
    return next(group for cell, group in zip(cells, groups, strict=True) if dist.get_rank() in cell)


@dataclass(frozen=True)
class Ranks:
    """One dimension of the mesh, as this rank sees it. Unlike a DeviceMesh, it can be used in any thread."""

    group: dist.ProcessGroup
    size: int
    index: int

    @classmethod
    def of(cls, mesh: DeviceMesh, dim: str) -> Ranks:
        part = mesh[dim]
        return cls(part.get_group(), part.size(), part.get_local_rank())

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks. Overwrites ``x``."""
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, all of one shape, joined along ``dim`` in the order of the ranks."""
        if self.size == 1:
            return x
        first = x.movedim(dim, 0).contiguous()
        out = first.new_empty(self.size * first.shape[0], *first.shape[1:])
        _all_gather(out, first, group=self.group)
        return out.movedim(0, dim)

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """All-to-all: part ``i`` of the first dimension goes to rank ``i``, and theirs come in its place."""
        if self.size == 1:
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return out
