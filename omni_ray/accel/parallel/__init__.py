"""Spreads a pipeline's transformers over ranks: tensor and sequence parallelism on one device mesh."""

from omni_ray.accel.parallel.apply import apply_parallel
from omni_ray.accel.parallel.mesh import build_mesh

__all__ = ["apply_parallel", "build_mesh"]
