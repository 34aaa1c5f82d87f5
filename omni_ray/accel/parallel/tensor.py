"""Tensor parallelism: each rank keeps a part of every Linear (Megatron-LM, https://arxiv.org/abs/1909.08053).

The plans and the slicing are diffusers' own. The sharded Linears are plain ones, not DTensors: the dispatch of those
costs more than the launch of a kernel, and their making sends every weight through the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks.tensor_parallel import _local_shard, resolve_tp_shard_specs
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.fp8 import product
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.paths import expand
from omni_ray.config.catalog import TensorPlan
from omni_ray.errors import ConfigError


class RowwiseLinear(torch.nn.Linear):
    """A Linear whose inputs are spread over the ranks: the ranks' outputs are summed, then the bias is added, once."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.ranks.sum(product(self, x))
        return out if self.bias is None else out + self.bias


class GatheredLinear(torch.nn.Linear):
    """A Linear whose outputs are spread over the ranks and then gathered, so that every rank has them all."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(product(self, x, self.bias), -1)


class ShardedRMSNorm(torch.nn.RMSNorm):
    """An RMSNorm whose last dimension is spread over the ranks: the mean of squares is that of the whole."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.shape[-1] * self.ranks.size
        wide = x.float()
        squares = self.ranks.sum(wide.square().sum(-1, keepdim=True))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = wide * torch.rsqrt(squares / whole + eps)
        return (out if self.weight is None else out * self.weight).to(x.dtype)


def shard_specs(transformer: Any, plan: TensorPlan, degree: int) -> dict[str, Any]:
    """Per parameter, the dimension to cut and its blocks; ConfigError where one does not divide. Changes nothing."""
    linears: dict[str, Any] = (
        dict(transformer._tp_plan) if plan.linears is None else _expanded(transformer, plan.linears)
    )
    linears |= dict.fromkeys(_gathered(transformer, plan), "colwise")
    try:
        return dict(resolve_tp_shard_specs(transformer, linears, degree))
    except ValueError as error:
        raise ConfigError(f"parallel: tensor {degree} cannot split {type(transformer).__name__}: {error}") from error


def _expanded(transformer: Any, linears: Mapping[str, str]) -> dict[str, str]:
    return {name: style for path, style in linears.items() for name in expand(transformer, path)}


def _gathered(transformer: Any, plan: TensorPlan) -> set[str]:
    return {name for path in plan.gathered for name in expand(transformer, path)}


def apply_tensor(transformer: Any, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Cut the weights to this rank's part of ``mesh``, a mesh of one dimension."""
    ranks = Ranks.of(mesh, "tensor")
    gathered = _gathered(transformer, plan)
    for name, spec in shard_specs(transformer, plan, ranks.size).items():
        path, _, key = name.rpartition(".")
        linear = transformer.get_submodule(path)
        if spec.dim is not None:
            _cut(linear, key, _local_shard(getattr(linear, key).detach(), spec.dim, spec.block_sizes, mesh))
        if key == "weight":
            linear.out_features, linear.in_features = linear.weight.shape
            if spec.dim == 1:
                linear.__class__, linear.ranks = RowwiseLinear, ranks
            elif path in gathered:
                linear.__class__, linear.ranks = GatheredLinear, ranks
    for path in plan.norms:
        for norm in expand(transformer, path).values():
            if norm.weight is not None:
                _cut(norm, "weight", norm.weight.detach().chunk(ranks.size)[ranks.index])
            norm.__class__, norm.ranks = ShardedRMSNorm, ranks
    for path in plan.divide_heads:
        for attention in expand(transformer, path).values():
            attention.heads //= ranks.size


def _cut(module: torch.nn.Module, key: str, part: torch.Tensor) -> None:
    """Keep ``part`` of a parameter, in memory of its own, so that the whole is freed."""
    whole = getattr(module, key)
    setattr(module, key, torch.nn.Parameter(part.clone(), requires_grad=whole.requires_grad))
