"""The nodes that a plan is made for: described in words, or those of this machine."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from omni_ray.config.nearest import hint
from omni_ray.errors import ConfigError
from omni_ray.plan.cards import CARDS, Card

GIB = 2**30
EXAMPLE = "8xH100-80G x 2"


@dataclass(frozen=True)
class Node:
    """A machine: ``num_gpus`` cards of one kind, or none. ``host_gib`` is its main memory, 0 where it is not known."""

    name: str
    card: Card | None
    num_gpus: int
    host_gib: float = 0.0


Inventory = tuple[Node, ...]


def parse_inventory(texts: Sequence[str]) -> Inventory:
    """Nodes from descriptions such as ``8xH100-80G x 2``: GPUs of a node, the card, and how many such nodes.

    Raises:
        ConfigError: a description is not of that form, or names a card that the hardware table lacks.
    """
    nodes: list[Node] = []
    for text in texts:
        found = re.fullmatch(r"\s*(\d+)\s*[xX]\s*([A-Za-z0-9.-]+?)(?:\s*[xX]\s*(\d+))?\s*", text)
        if not found or not int(found[1]) or found[3] == "0":
            raise ConfigError(f"--inventory {text!r}: it should be like {EXAMPLE!r}: GPUs per node, card, nodes")
        card = _card(found[2])
        nodes += [Node(f"node-{len(nodes) + i}", card, int(found[1])) for i in range(int(found[3] or 1))]
    return tuple(nodes)


def _card(name: str) -> Card:
    near = [card for card in CARDS.values() if card.name.lower().startswith(name.lower())]
    if len(near) == 1 or (near and near[0].name.lower() == name.lower()):
        return near[0]
    choose = "choose from " + ", ".join(card.name for card in near) if near else hint(name, list(CARDS))
    raise ConfigError(f"--inventory: no card of the hardware table is called {name!r}; {choose}")


def local_inventory() -> Inventory:
    """This machine, with the GPUs that nvidia-smi lists; without nvidia-smi it has none.

    A card that the hardware table lacks gets its memory from nvidia-smi and no rates: then no seconds are told.
    """
    host_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    gpus = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    if not gpus:
        return (Node("this machine", None, 0, host_gib),)
    name, mib = gpus[0]
    return (Node("this machine", card_called(name.strip(), float(mib) / 1024), len(gpus), host_gib),)


def card_called(name: str, gib: float) -> Card:
    """The card that nvidia-smi calls ``name``, and whose memory it gives as ``gib``."""
    near = [card for card in CARDS.values() if card.smi in name]
    return min(near, key=lambda card: abs(card.gib - gib)) if near else Card(name, gib, 0, 0, 0, 0, 0, name)


def unknown_node(name: str, num_gpus: int) -> Node:
    """A node whose memory nobody told: everything fits there."""
    return Node(name, Card("GPU", math.inf, 0, 0, 0, 0, 0, "") if num_gpus else None, num_gpus)


def describe(inventory: Inventory) -> str:
    """One line: how many nodes of which kind."""
    kinds: dict[tuple[int, Card | None], list[Node]] = {}
    for node in inventory:
        kinds.setdefault((node.num_gpus, node.card), []).append(node)
    return ", ".join(_kind(*kind, nodes) for kind, nodes in kinds.items())


def _kind(num_gpus: int, card: Card | None, nodes: list[Node]) -> str:
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} of "
    if card is None:
        return f"{count}no GPU, {nodes[0].host_gib:.0f} GiB of memory"
    return f"{count}{num_gpus} x {card.name} ({card.gib:.1f} GiB each)"
