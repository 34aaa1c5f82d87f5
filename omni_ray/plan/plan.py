"""The Plan: a spec on an inventory. What ``omni-ray plan`` prints is the object that the application is built from."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from omni_ray.config.spec import ArGroup, DitGroup, OmniSpec, Pipeline
from omni_ray.errors import ConfigError
from omni_ray.messages import Room
from omni_ray.plan.autoencoders import Autoencoder, autoencoder
from omni_ray.plan.cards import Card
from omni_ray.plan.checkpoint import Checkpoint, read_checkpoint
from omni_ray.plan.inventory import Inventory, Node, describe
from omni_ray.plan.language import language, of_weights
from omni_ray.plan.memory import Memory, ar_memory, dit_memory
from omni_ray.plan.parts import parts_of
from omni_ray.plan.placement import Free, Placement, Seat, num_replicas, place
from omni_ray.plan.refusals import Refusal, group_refusals
from omni_ray.plan.request import Request, default_request, square
from omni_ray.plan.seconds import Estimate, ar_tokens_per_s, dit_seconds, nodes_of_axes

PARTS = 32
"""Of ``limits.max_pixels``: what fits is known so well."""


@dataclass(frozen=True)
class Need:
    """What one rank of a group needs of a kind of node, and what it gives."""

    memory: Memory
    request: Request | None = None
    estimate: Estimate | None = None
    tokens_per_s: float | None = None
    largest: Request | None = None
    """The largest request that ``limits`` allow, where memory does not allow it."""
    room: Room | None = None
    """What fits, with the default number of frames; None: all that ``limits`` allow."""


@dataclass(frozen=True)
class GroupPlan:
    """A replica group: its placement group, where its replicas run, and what each rank needs there."""

    index: int
    group: ArGroup | DitGroup
    placement: Placement
    seats: tuple[Seat, ...]
    card: Card | None
    refusals: tuple[Refusal, ...]
    checkpoint: Checkpoint | None = None
    need: Need | None = None
    unknown: str = ""
    """Why there is no ``need``: nothing of the checkpoint is on this machine, or its config is of no known kind."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All groups of a spec."""

    spec: OmniSpec
    inventory: Inventory
    groups: tuple[GroupPlan, ...]
    free: Free = field(compare=False, repr=False)
    """What of the inventory was free before this plan."""

    @property
    def refusals(self) -> list[Refusal]:
        return [refusal for group in self.groups for refusal in group.refusals]

    def placement(self, group_id: str) -> Placement:
        """The placement group of the replicas of a group."""
        return next(each.placement for each in self.groups if each.group.id == group_id)


def make_plan(
    spec: OmniSpec, inventory: Inventory, free: Free | None = None, read: Callable[[str], Checkpoint] = read_checkpoint
) -> Plan:
    """Plan every group. The groups that are hardest to seat come first, so that they find whole nodes.

    Args:
        free: what other applications have left of the inventory; what this one takes is taken from it.
        read: the checkpoint of a source; who plans often may remember it.
    """
    free = free or Free(inventory)
    before = copy.deepcopy(free)
    has_gpus = any(node.num_gpus for node in inventory)
    groups = [(i, model) for i, model in enumerate(spec.models) if not isinstance(model, Pipeline)]
    hardest = sorted(groups, key=lambda each: -each[1].parallel.num_ranks * each[1].num_gpus)
    plans = [_plan_group(i, group, free, place(group, has_gpus), read) for i, group in hardest]
    return Plan(spec, inventory, tuple(sorted(plans, key=lambda plan: plan.index)), before)


def _plan_group(
    index: int, group: ArGroup | DitGroup, free: Free, placement: Placement, read: Callable[[str], Checkpoint]
) -> GroupPlan:
    inventory = free.inventory
    nodes = [node for node in inventory if node.num_gpus or not placement.num_gpus]
    checkpoint, needs, unknown, refusals = None, {}, "", []
    try:
        checkpoint = read(group.source)
        refusals = group_refusals(index, group, checkpoint)
        if not any(refusal.key == "source" for refusal in refusals):
            needs = {node.card: need_of(group, checkpoint, node, placement) for node in nodes}
    except ConfigError as error:
        unknown = f"models[{index}].source: {error.message}"
    except (KeyError, TypeError, ValueError) as error:
        unknown = f"models[{index}].source: a config.json of {group.source!r} lacks what its kind needs: {error!r}"
    if group.device == "cuda" and not placement.num_gpus:
        message = "cuda, but no node has a GPU; set device: auto, or add a GPU node"
        refusals.append(Refusal(index, "device", message, is_final=True))
    gib = {card: need.memory.needed_gib for card, need in needs.items()}
    roomy = [node for node in nodes if needs and needs[node.card].memory.fits]
    refusals += _not_spread(index, group, placement, free)
    seats: list[Seat] = []
    while len(seats) < num_replicas(group) and (seat := free.take(placement, roomy or nodes, gib)):
        seats.append(seat)
    card = seats[0].card if seats else max((node.card for node in nodes), key=lambda each: each.gib if each else 0)
    need = needs.get(card)
    if need and not need.memory.fits:
        refusals.append(_too_large(index, group, need.memory, card if placement.num_gpus else None))
    if len(seats) < num_replicas(group):
        refusals.append(_no_room(index, group, placement, len(seats), free, gib.get(card, 0.0)))
    notes = tuple(_notes(group, placement, needs, nodes, card))
    card = card if placement.num_gpus else None
    return GroupPlan(index, group, placement, tuple(seats), card, tuple(refusals), checkpoint, need, unknown, notes)


def _notes(
    group: ArGroup | DitGroup,
    placement: Placement,
    needs: dict[Card | None, Need],
    nodes: list[Node],
    card: Card | None,
) -> Iterator[str]:
    """What works, but not as one might think."""
    need, gpus = needs.get(card), placement.ranks_per_node * placement.num_gpus
    elsewhere = [node for node in nodes if node.num_gpus >= gpus > 0 and node.card in needs]
    small = [node.name for node in elsewhere if not needs[node.card].memory.fits]
    if need and need.memory.fits and small:
        yield f"Ray knows no GiB of GPUs, and may place it on {', '.join(small)} too, where it does not fit"
    if need and need.request and isinstance(group, DitGroup) and need.request.branches < group.parallel.cfg:
        yield "cfg 2, but by default a step has one forward here: half of the ranks idle; see defaults"
    if across := nodes_of_axes(group.parallel).keys() & EVERY_LAYER:
        axes = " and ".join(f"{axis} {getattr(group.parallel, axis)}" for axis in sorted(across))
        instead = "pipeline" if isinstance(group, ArGroup) else "cfg or ring"
        yield (
            f"{axes} does not stay inside a node, which has {placement.ranks_per_node} of the ranks: every layer waits "
            f"for the network; lower it, and let {instead} span nodes"
        )
    if need and need.largest and need.room:
        change = f"set limits.max_pixels to {need.room.alone}"
        if need.room.frames > 1:
            fits = f"{need.room.alone} pixels with {need.room.frames} frames"
            change = f"{fits} do: lower limits.max_pixels or limits.max_frames"
        yield f"limits allow {need.largest}, which does not fit beside the weights; {change}"


def need_of(group: ArGroup | DitGroup, checkpoint: Checkpoint, node: Node, placement: Placement) -> Need:
    """What a rank of the group needs on a GPU of ``node``. Raises ConfigError where the model's size is not known."""
    on_gpu = bool(placement.num_gpus) and node.card is not None
    whole = node.card.gib if on_gpu and node.card else node.host_gib or math.inf
    budget = whole * group.memory.gpu_memory_utilization if on_gpu else whole
    if isinstance(group, ArGroup):
        component = checkpoint.components[0]
        model = language(component.config, component.cls)
        model = model or of_weights(component.config, component.cls, component.num_params)
        if model is None:
            kind = component.config.get("model_type")
            raise ConfigError(
                f"the size of a model_type {kind!r} cannot be computed from its config alone; "
                f"download the *.safetensors files of {group.source!r}"
            )
        memory = ar_memory(group, model, component, budget, on_gpu)
        tokens = ar_tokens_per_s(group, model, component, node.card) if on_gpu and node.card else None
        return Need(memory, tokens_per_s=tokens)
    parts = parts_of(checkpoint)
    vae = next((part.model for part in parts if isinstance(part.model, Autoencoder)), autoencoder({}))
    request = default_request(group, checkpoint, vae)
    memory = dit_memory(group, parts, request, budget, on_gpu)
    estimate = dit_seconds(group, parts, request, node.card) if on_gpu and node.card else None
    most, outputs = group.limits.max_pixels, group.limits.max_outputs
    longest = group.limits.max_frames if request.frames > 1 else 1

    def fits(num_pixels: int, frames: int, pictures: int) -> bool:
        asked = square(request, vae, num_pixels, frames, pictures)
        return dit_memory(group, parts, asked, budget, on_gpu).fits

    def most_pixels(pictures: int) -> int:
        steps = range(1, PARTS * pictures + 1)
        num = bisect.bisect_left(steps, True, key=lambda step: not fits(most * step // PARTS, request.frames, pictures))
        found = square(request, vae, most * num // PARTS, request.frames)
        return max(found.width * found.height, request.width * request.height)

    if not memory.fits or (fits(most, longest, 1) and fits(most * outputs, longest, outputs)):
        return Need(memory, request, estimate)
    room = Room(most_pixels(1), most_pixels(outputs), request.frames)
    largest = None if fits(most, longest, 1) else square(request, vae, most, longest)
    return Need(memory, request, estimate, largest=largest, room=room)


def _too_large(index: int, group: ArGroup | DitGroup, memory: Memory, card: Card | None) -> Refusal:
    items = " + ".join(f"{item.name} {item.gib:.1f}" for item in memory.items if item.gib >= 0.05)
    budget = (
        f"gpu_memory_utilization {group.memory.gpu_memory_utilization:g} of a {card.name}'s {card.gib:.1f} GiB is "
        f"{memory.budget_gib:.1f}"
        if card
        else f"this machine has {memory.budget_gib:.1f}"
    )
    over = memory.needed_gib - memory.budget_gib
    return Refusal(index, "memory", f"{items} = {memory.needed_gib:.1f} GiB a rank, but {budget}: {over:.1f} too much")


def _not_spread(index: int, group: ArGroup | DitGroup, placement: Placement, free: Free) -> Iterator[Refusal]:
    """Why a replica cannot be spread over several nodes, though they have room."""
    nodes = placement.num_nodes
    if nodes > 1 and not placement.num_gpus and isinstance(group, ArGroup):
        message = f"num_nodes {nodes}, but vLLM spans nodes with GPUs alone, and the ranks run on CPUs; set it to 1"
        yield Refusal(index, "parallel", message, is_final=group.device == "cpu")
    if nodes > 1 and placement.num_gpus and (roomy := next(free.with_room_for_all(placement), None)):
        message = (
            f"num_nodes {nodes}, but {roomy.name!r} alone has GPUs for all {placement.num_ranks} ranks, and Ray packs "
            "them onto as few nodes as have room; lower it"
        )
        yield Refusal(index, "parallel", message)


def _no_room(
    index: int, group: ArGroup | DitGroup, placement: Placement, num_seated: int, free: Free, gib: float
) -> Refusal:
    inventory, ranks, nodes = free.inventory, placement.num_ranks, placement.num_nodes
    gpus = placement.ranks_per_node * placement.num_gpus
    largest = max(inventory, key=lambda node: node.num_gpus)
    needs = f"{axes_of(group) or '1'} = {counted(ranks, 'rank')}"
    if nodes > len(inventory):
        message = f"num_nodes {nodes}, but the inventory has {counted(len(inventory), 'node')}; lower it, or add nodes"
        return Refusal(index, "parallel", f"{needs}, {message}")
    if gpus > largest.num_gpus:
        needs += f", {placement.ranks_per_node} on each of {nodes} nodes" if nodes > 1 else ""
        has = f"the node {largest.name!r} has {largest.num_gpus} GPUs"
        has += " and the others no more" if len(inventory) > 1 else ""
        return Refusal(index, "parallel", f"{needs}, but {has}; lower one of them, or raise num_nodes")
    wanted = f"{counted(num_replicas(group), 'replica')} x {counted(ranks, 'rank')}"
    wanted += f" on {nodes} nodes" if nodes > 1 else ""
    if not gpus:
        message = f"{wanted} of {gib:.1f} GiB each, but the main memory has room for {num_seated}; lower it"
        return Refusal(index, "num_replicas", message)
    total = sum(node.num_gpus for node in inventory)
    sharing = f"; ranks that share a GPU have to fit it together, with {gib:.1f} GiB each" if group.num_gpus < 1 else ""
    return Refusal(
        index,
        "num_replicas",
        f"{wanted}, but of the {total} GPUs ({describe(inventory)}) the other groups leave room for {num_seated}, "
        f"and {free.largest()} GPUs on one node at most{sharing}; lower it, or add a node",
    )


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


EVERY_LAYER = {"tensor", "ulysses"}
"""Axes whose ranks exchange in every layer and wait for it; ring computes meanwhile."""


def axes_of(group: ArGroup | DitGroup) -> str:
    """The axes in use, such as ``tensor 2 x ulysses 4``; empty for one rank."""
    degrees = ((axis, getattr(group.parallel, axis)) for axis in group.parallel.axes)
    return " x ".join(f"{axis} {degree}" for axis, degree in degrees if degree > 1)
