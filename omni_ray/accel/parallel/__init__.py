"""Spreads a pipeline over ranks: tensor and sequence parallelism of its transformers on one mesh, and the decoder."""

from omni_ray.accel.parallel.apply import apply_parallel
from omni_ray.accel.parallel.decode import split_decode
from omni_ray.accel.parallel.mesh import build_mesh

__all__ = ["apply_parallel", "build_mesh", "split_decode"]
