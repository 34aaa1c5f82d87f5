"""Which rank runs on which node and GPU, and the placement group that Ray is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.plan.cards import Card
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


class Free:
    """What of the nodes no replica has taken yet: of each GPU its share and its GiB, of each node its main memory."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self._share = [[1.0] * node.num_gpus for node in inventory]
        self._gib = [[node.card.gib if node.card else 0.0] * node.num_gpus for node in inventory]
        self._host_gib = [node.host_gib or math.inf for node in inventory]

    def take(self, placement: Placement, nodes: Iterable[Node], gib: Mapping[Card | None, float]) -> Seat | None:
        """Seat a replica on the fullest of ``nodes`` that has room, and take it. None where none has.

        Args:
            gib: what a rank needs on each kind of card, or, for ranks on CPUs, of main memory.
        """
        allowed = list(nodes)
        seats = [
            (sum(self._share[i]), i, gpus)
            for i, node in enumerate(self.inventory)
            if node in allowed and (gpus := self._seat(i, placement, gib.get(node.card, 0.0))) is not None
        ]
        if not seats:
            return None
        _, index, gpus = min(seats)
        needed = gib.get(self.inventory[index].card, 0.0)
        for gpu in gpus:
            self._share[index][gpu] -= placement.num_gpus
            self._gib[index][gpu] -= needed
        if not gpus:
            self._host_gib[index] -= needed * placement.num_ranks
        return Seat(self.inventory[index], gpus)

    def largest(self) -> int:
        """The most whole GPUs that are free on one node."""
        return max((sum(each > 1 - EPSILON for each in share) for share in self._share), default=0)

    def _seat(self, index: int, placement: Placement, gib: float) -> tuple[int, ...] | None:
        """GPUs for all ranks of a replica, the ones with least room first, so that whole ones stay whole."""
        if not placement.num_gpus:
            return () if gib * placement.num_ranks <= self._host_gib[index] else None
        share, room, gpus = list(self._share[index]), list(self._gib[index]), []
        for _ in range(placement.num_ranks):
            fitting = [
                (left, gpu)
                for gpu, left in enumerate(share)
                # A GPU that nobody shares may be too small: that is told in another way.
                if left > placement.num_gpus - EPSILON and (left > 1 - EPSILON or room[gpu] >= gib)
            ]
            if not fitting:
                return None
            _, gpu = min(fitting)
            share[gpu] -= placement.num_gpus
            room[gpu] -= gib
            gpus.append(gpu)
        return tuple(gpus)
