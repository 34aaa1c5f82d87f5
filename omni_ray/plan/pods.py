"""The worker pods that a plan needs on Kubernetes, as values of the Helm chart.

A pod is as large as the plan fills the fullest node of its kind, because Ray may seat replicas otherwise than the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.plan.cards import Card
from omni_ray.plan.checkpoint import Checkpoint
from omni_ray.plan.inventory import Node
from omni_ray.plan.language import language
from omni_ray.plan.parts import parts_of
from omni_ray.plan.placement import Seat
from omni_ray.plan.plan import GroupPlan, Plan

RAY_GIB = 2.0
REPLICA_GIB = {"ar": 1.5, "dit": 0.5}
"""Main memory of Ray's own processes in a pod, and of a replica's processes beside its ranks. With the demo models they
take about half of that."""

GPU_RANK_GIB = 6.0
"""Main memory of a rank on a GPU, beside weights that it keeps there. An estimate."""

SHARED_GIB_PER_RANK = 1
MIN_SHARED_GIB = 2
"""Half of it is Ray's object store, half for NCCL and for what vLLM's processes share, 0.4 GiB for one replica."""

CPUS_PER_GPU_RANK = 2
CACHE_SPARE_GIB = 10
CACHE_STEP_GIB = 10

PRODUCTS = {
    "H100-80G": "NVIDIA-H100-80GB-HBM3",
    "H200-141G": "NVIDIA-H200",
    "H20-96G": "NVIDIA-H20",
    "B200-180G": "NVIDIA-B200",
    "A100-80G": "NVIDIA-A100-SXM4-80GB",
    "A100-40G": "NVIDIA-A100-SXM4-40GB",
    "L40S-48G": "NVIDIA-L40S",
    "RTX6000Ada-48G": "NVIDIA-RTX-6000-Ada-Generation",
    "RTXPRO6000-96G": "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
    "RTX5090-32G": "NVIDIA-GeForce-RTX-5090",
    "RTX4090-24G": "NVIDIA-GeForce-RTX-4090",
    "RTX3090-24G": "NVIDIA-GeForce-RTX-3090",
    "A6000-48G": "NVIDIA-RTX-A6000",
    "A10G-24G": "NVIDIA-A10G",
    "L4-24G": "NVIDIA-L4",
}
"""What NVIDIA's GPU feature discovery writes into the label ``nvidia.com/gpu.product`` of a machine with the card."""


@dataclass
class Load:
    """What the plan puts on one node. ``is_needed`` is false where only replicas beyond the least number run."""

    gpus: set[int] = field(default_factory=set)
    num_ranks: int = 0
    num_cpus: float = 0.0
    gib: float = 0.0
    is_needed: bool = False


def worker_groups(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """A group of pods for each kind of node that the plans use, as `workers` of the chart.

    The plans share an inventory.
    """
    kinds: dict[tuple[Card | None, int], list[Load]] = {}
    for node, load in _loads(plans):
        kinds.setdefault((node.card, node.num_gpus), []).append(load)
    return [_workers(card, num_gpus, loads) for (card, num_gpus), loads in kinds.items()]


def cache_gib(plans: Sequence[Plan]) -> int:
    """A size for the volume of weights and compiled code: what the sources hold in 16 bits, and some room."""
    sources = {group.group.source: group.checkpoint for plan in plans for group in plan.groups if group.checkpoint}
    gib = sum(map(_num_bytes, sources.values())) / 2**30 + CACHE_SPARE_GIB
    return math.ceil(gib / CACHE_STEP_GIB) * CACHE_STEP_GIB


def _num_bytes(checkpoint: Checkpoint) -> float:
    if checkpoint.pipeline:
        return sum(part.num_bytes(2) for part in parts_of(checkpoint))
    component = checkpoint.components[0]
    model = language(component.config, component.cls)
    stored = component.num_params * 2 + component.num_packed_bytes
    return stored or (model.num_params * 2 if model else 0)


def _loads(plans: Iterable[Plan]) -> Iterator[tuple[Node, Load]]:
    loads: dict[str, tuple[Node, Load]] = {}
    for group in (group for plan in plans for group in plan.groups):
        for i, seat in enumerate(group.seats):
            for node, gpus in zip(seat.nodes, seat.gpus, strict=True):
                _, load = loads.setdefault(node.name, (node, Load()))
                _add(load, group, seat, gpus, is_needed=i < _least(group.group))
    yield from loads.values()


def _add(load: Load, group: GroupPlan, seat: Seat, gpus: tuple[int, ...], *, is_needed: bool) -> None:
    placement = group.placement
    ranks = placement.num_ranks // len(seat.nodes)
    load.gpus |= set(gpus)
    load.num_ranks += ranks
    load.num_cpus += max(placement.num_cpus, CPUS_PER_GPU_RANK if gpus else 0.0) * ranks
    load.gib += ranks * _rank_gib(group) + REPLICA_GIB[group.group.type]
    load.is_needed |= is_needed


def _rank_gib(group: GroupPlan) -> float:
    """Of main memory."""
    assert group.need is not None
    memory = group.need.memory
    return GPU_RANK_GIB + memory.host_gib if group.placement.num_gpus else memory.needed_gib


def _least(group: ArGroup | DitGroup) -> int:
    """Replicas when idle."""
    return group.autoscaling.min_replicas if group.autoscaling else group.num_replicas


def _workers(card: Card | None, num_gpus: int, loads: list[Load]) -> dict[str, Any]:
    """What is not in it stays as the chart has it."""
    shared = max(MIN_SHARED_GIB, SHARED_GIB_PER_RANK * max(load.num_ranks for load in loads))
    least = sum(load.is_needed for load in loads)
    values: dict[str, Any] = {"name": f"{num_gpus}x{card.name.lower()}" if card else "cpu", "replicas": least}
    if least < len(loads):
        values |= {"minReplicas": least, "maxReplicas": len(loads)}
    values |= {
        "cpus": math.ceil(max(load.num_cpus for load in loads)) + 1,
        "memoryGiB": math.ceil(RAY_GIB + shared + max(load.gib for load in loads)),
        "sharedMemoryGiB": shared,
    }
    if card:
        values["gpus"] = max(len(load.gpus) for load in loads)
        if product := PRODUCTS.get(card.name):
            values["nodeSelector"] = {"nvidia.com/gpu.product": product}
        values["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return values
