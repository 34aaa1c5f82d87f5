"""Which rank runs on which node and GPU, and the placement group that Ray is asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from omni_ray.config.spec import ArGroup, DitGroup, Parallel
from omni_ray.errors import ConfigError
from omni_ray.plan.cards import Card
from omni_ray.plan.inventory import Inventory, Node

EPSILON = 1e-6
"""Ray's fractions of a GPU may not add up to 1 in floating point."""


@dataclass(frozen=True)
class Placement:
    """The placement group of each replica of a group: a bundle per rank, on ``num_nodes`` nodes."""

    num_ranks: int
    num_cpus: float
    num_gpus: float
    """Of a rank; 0 on a CPU."""
    num_nodes: int = 1

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def bundles(self) -> list[dict[str, float]]:
        """``placement_group_bundles`` of Ray Serve: bundle i is rank i's."""
        bundle = {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})
        return [dict(bundle) for _ in range(self.num_ranks)]

    @property
    def strategy(self) -> str:
        """``placement_group_strategy``: a gang talks at every layer, so it stays inside a node where it can.

        On several nodes Ray packs as well as it can; `rank_order` checks what came of it.
        """
        return "STRICT_PACK" if self.num_nodes == 1 else "PACK"


def rank_order(node_of: Mapping[int, str], parallel: Parallel, model: str) -> list[int]:
    """The bundles of a placed group in the order of its ranks: those of one node follow each other.

    Args:
        node_of: the node of each bundle, as Ray's ``bundles_to_node_id`` tells it.

    Raises:
        ConfigError: the nodes are not ``parallel.num_nodes``, or do not have the same number of ranks each.
    """
    counts = Counter(node_of.values())
    if len(counts) != parallel.num_nodes or set(counts.values()) != {parallel.ranks_per_node}:
        placed = ", ".join(f"{count} on {node}" for node, count in sorted(counts.items()))
        change = (
            f"set num_nodes to {len(counts)}"
            if len(set(counts.values())) == 1
            else f"make room for {parallel.ranks_per_node} ranks on each of {parallel.num_nodes} nodes"
        )
        raise ConfigError(
            f"model {model!r}: parallel.num_nodes = {parallel.num_nodes} needs {parallel.ranks_per_node} of the "
            f"{parallel.num_ranks} ranks on each node, but Ray, which packs them onto as few nodes as have room, "
            f"placed {placed}; {change}"
        )
    return sorted(node_of, key=lambda bundle: (node_of[bundle], bundle))


def place(group: ArGroup | DitGroup, has_gpus: bool) -> Placement:
    """The placement of a group in a cluster with or without GPUs. ``device: auto`` takes GPUs where there are any."""
    num_gpus = group.num_gpus if has_gpus and group.device != "cpu" else 0
    return Placement(group.parallel.num_ranks, group.num_cpus, num_gpus, group.parallel.num_nodes)


def num_replicas(group: ArGroup | DitGroup) -> int:
    """Replicas at full load."""
    return group.autoscaling.max_replicas if group.autoscaling else group.num_replicas


@dataclass(frozen=True)
class Seat:
    """Where one replica runs: its nodes, and of each the GPUs of its ranks there; without GPUs they are empty."""

    nodes: tuple[Node, ...]
    gpus: tuple[tuple[int, ...], ...]

    @property
    def card(self) -> Card | None:
        """The card of its nodes, which is the same on all."""
        return self.nodes[0].card


class Free:
    """What of the nodes no replica has taken yet: of each GPU its share and its GiB, of each node its main memory."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self._share = [[1.0] * node.num_gpus for node in inventory]
        self._gib = [[node.card.gib if node.card else 0.0] * node.num_gpus for node in inventory]
        self._host_gib = [node.host_gib or math.inf for node in inventory]

    def take(self, placement: Placement, nodes: Iterable[Node], gib: Mapping[Card | None, float]) -> Seat | None:
        """Seat a replica on the fullest of ``nodes`` that have room, and take it. None where none have.

        The nodes of one replica have the same card.

        Args:
            gib: what a rank needs on each kind of card, or, for ranks on CPUs, of main memory.
        """
        allowed, choices = list(nodes), []
        for card in dict.fromkeys(node.card for node in allowed):
            seats = sorted(
                (sum(self._share[i]), i, gpus)
                for i, node in enumerate(self.inventory)
                if node in allowed
                and node.card == card
                and (gpus := self._seat(i, placement, gib.get(card, 0.0))) is not None
            )[: placement.num_nodes]
            if len(seats) == placement.num_nodes:
                choices.append((sum(share for share, _, _ in seats), [(i, gpus) for _, i, gpus in seats]))
        if not choices:
            return None
        _, chosen = min(choices)
        chosen.sort()
        for index, gpus in chosen:
            self._take(index, gpus, placement, gib.get(self.inventory[index].card, 0.0))
        return Seat(tuple(self.inventory[index] for index, _ in chosen), tuple(gpus for _, gpus in chosen))

    def _take(self, index: int, gpus: tuple[int, ...], placement: Placement, gib: float) -> None:
        for gpu in gpus:
            self._share[index][gpu] -= placement.num_gpus
            self._gib[index][gpu] -= gib
        if not gpus:
            self._host_gib[index] -= gib * placement.ranks_per_node

    def with_room_for_all(self, placement: Placement) -> Iterator[Node]:
        """The nodes whose free GPUs are enough for all ranks of a replica, whatever their memory."""
        for node, share in zip(self.inventory, self._share, strict=True):
            if sum((each + EPSILON) // placement.num_gpus for each in share) >= placement.num_ranks:
                yield node

    def largest(self) -> int:
        """The most whole GPUs that are free on one node."""
        return max((sum(each > 1 - EPSILON for each in share) for share in self._share), default=0)

    def _seat(self, index: int, placement: Placement, gib: float) -> tuple[int, ...] | None:
        """GPUs for a node's ranks of a replica, the ones with least room first, so that whole ones stay whole."""
        if not placement.num_gpus:
            return () if gib * placement.ranks_per_node <= self._host_gib[index] else None
        share, room, gpus = list(self._share[index]), list(self._gib[index]), []
        for _ in range(placement.ranks_per_node):
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
