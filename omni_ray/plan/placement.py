"""Which rank runs on which node and GPU, and the placement group that Ray is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.plan.inventory import Inventory, Node

EPSILON = 1e-6
"""Ray's fractions of a GPU may not add up to 1 in floating point."""


@dataclass(frozen=True)
class Placement:
    """The placement group of each replica of a group: a bundle per rank, all on one node."""

    num_ranks: int
    num_cpus: float
    num_gpus: float
    """Of a rank; 0 on a CPU."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """``placement_group_bundles`` of Ray Serve: bundle i is rank i's."""
        bundle = {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})
        return [dict(bundle) for _ in range(self.num_ranks)]

    @property
    def strategy(self) -> str:
        """``placement_group_strategy``: a gang talks at every layer, so it stays inside a node."""
        return "STRICT_PACK"


def place(group: ArGroup | DitGroup, has_gpus: bool) -> Placement:
    """The placement of a group in a cluster with or without GPUs. ``device: auto`` takes GPUs where there are any."""
    num_gpus = group.num_gpus if has_gpus and group.device != "cpu" else 0
    return Placement(group.parallel.num_ranks, group.num_cpus, num_gpus)


def num_replicas(group: ArGroup | DitGroup) -> int:
    """Replicas at full load."""
    return group.autoscaling.max_replicas if group.autoscaling else group.num_replicas


@dataclass(frozen=True)
class Seat:
    """Where one replica runs: its node, and the GPU of each rank; without GPUs it is empty."""

    node: Node
    gpus: tuple[int, ...]


@dataclass
class FreeGpus:
    """What of the nodes' GPUs no replica has taken yet."""

    inventory: Inventory
    left: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.left = [[1.0] * node.num_gpus for node in self.inventory]

    def take(self, placement: Placement, nodes: Iterable[Node]) -> Seat | None:
        """Seat a replica on the fullest of ``nodes`` that has room, and take its GPUs. None where none has."""
        allowed = list(nodes)
        seats = [
            (sum(left), i, gpus)
            for i, (node, left) in enumerate(zip(self.inventory, self.left, strict=True))
            if node in allowed and (gpus := _seat(left, placement)) is not None
        ]
        if not seats:
            return None
        _, index, gpus = min(seats)
        for gpu in gpus:
            self.left[index][gpu] -= placement.num_gpus
        return Seat(self.inventory[index], gpus)

    def largest(self) -> int:
        """The most whole GPUs that are free on one node."""
        return max((sum(each > 1 - EPSILON for each in left) for left in self.left), default=0)


def _seat(left: list[float], placement: Placement) -> tuple[int, ...] | None:
    """GPUs for all ranks of a replica, the ones with least room first, so that whole ones stay whole."""
    if not placement.num_gpus:
        return ()
    room, gpus = list(left), []
    for _ in range(placement.num_ranks):
        fitting = [(each, gpu) for gpu, each in enumerate(room) if each > placement.num_gpus - EPSILON]
        if not fitting:
            return None
        _, gpu = min(fitting)
        room[gpu] -= placement.num_gpus
        gpus.append(gpu)
    return tuple(gpus)
