"""Weights in host memory: whole components that come when they are called, or blocks that stream."""

from omni_ray.accel.offload.apply import Offload as Offload
from omni_ray.accel.offload.apply import apply_offload as apply_offload
from omni_ray.accel.offload.apply import home as home
from omni_ray.accel.offload.transfers import Transfers as Transfers
