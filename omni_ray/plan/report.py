"""A plan as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.plan.cards import Card
from omni_ray.plan.fixes import Fix
from omni_ray.plan.inventory import describe
from omni_ray.plan.memory import Item, KvCache, Memory
from omni_ray.plan.placement import Seat, num_replicas
from omni_ray.plan.plan import GroupPlan, Need, Plan, axes_of, counted
from omni_ray.plan.seconds import Estimate


def report(plan: Plan, fixes: Sequence[Fix] = ()) -> str:
    """Every group in a few lines, then what is refused and what would make it fit."""
    lines = [f"inventory: {describe(plan.inventory)}"]
    for group in plan.groups:
        lines += ["", *_group(group)]
    has_jobs = any(isinstance(group, DitGroup) for group in plan.spec.groups)
    if has_jobs and len(plan.inventory) > 1 and "folder" not in plan.spec.jobs.model_fields_set:
        lines += ["", f"jobs: in {plan.spec.jobs.folder} of one node; set jobs.folder to one that all nodes share"]
    refusals = plan.refusals
    lines += ["", *(f"refused: {refusal}" for refusal in refusals)]
    if refusals:
        lines += [f"  fix: {fix}" for fix in fixes] or ["  no change of one or two keys makes it fit"]
    else:
        lines += ["everything fits"]
    return "\n".join(lines)


def _group(plan: GroupPlan) -> Iterator[str]:
    group, replicas = plan.group, num_replicas(plan.group)
    assert plan.checkpoint is not None
    kind = plan.checkpoint.pipeline or plan.checkpoint.components[0].cls
    ranks = counted(plan.placement.num_ranks, "rank") + (f" ({axes_of(group)})" if axes_of(group) else "")
    ranks += f" on {plan.placement.num_nodes} nodes" if plan.placement.num_nodes > 1 else ""
    yield f"{group.id}: {group.type}, {group.source} ({kind}), {counted(replicas, 'replica')} x {ranks}"
    bundle = ", ".join(f"{name}: {amount:g}" for name, amount in plan.placement.bundles[0].items())
    yield f"  bundles   {plan.placement.num_ranks} x {{{bundle}}}, {plan.placement.strategy}"
    yield f"  nodes     {'; '.join(_seats(plan.seats)) or 'none has room'}"
    if plan.need:
        yield from _memory(plan.need.memory, plan)
        if plan.need.memory.host_gib:
            where = "page-locked main memory" if plan.placement.num_gpus else "main memory"
            yield f"  host      {plan.need.memory.host_gib:.1f} GiB of weights a rank in {where}"
        if plan.need.memory.kv_cache:
            yield f"  KV cache  {_kv_cache(plan.need.memory.kv_cache)}"
        yield f"  speed     {_speed(plan.need, plan.card, plan.placement.num_nodes)}"
        if plan.need.estimate and plan.need.estimate.network and plan.card:
            yield f"  network   {_network(plan.need.estimate, plan.card)}"
    for note in plan.notes:
        yield f"  note      {note}"


def _seats(seats: tuple[Seat, ...]) -> Iterator[str]:
    for i, seat in enumerate(seats):
        nodes = zip(seat.nodes, seat.gpus, strict=True)
        words = (node.name + (f" GPU {_ranges(gpus)}" if gpus else "") for node, gpus in nodes)
        yield (f"replica {i}: " if len(seats) > 1 else "") + " + ".join(words)


def _ranges(numbers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2, 5``; the order is that of the ranks."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _memory(memory: Memory, plan: GroupPlan) -> Iterator[str]:
    items = " + ".join(f"{item.name} {item.gib:.1f}" for item in memory.items if item.gib >= 0.05)
    verdict = "fits" if memory.fits else f"{memory.needed_gib - memory.budget_gib:.1f} too much"
    share = "a node's main memory" if math.isinf(memory.budget_gib) else f"{memory.budget_gib:.1f}"
    if plan.card and plan.placement.num_gpus:
        share = f"{plan.group.memory.gpu_memory_utilization:g} x {plan.card.gib:.1f} = {share}"
    yield f"  GiB/rank  {items} = {memory.needed_gib:.1f} of {share}: {verdict}"
    if plan.placement.num_ranks > 1:
        yield f"  axes      {_division(memory.items, plan.group)}"


def _division(items: tuple[Item, ...], group: ArGroup | DitGroup) -> str:
    divided = [item.name for item in items if item.divided_by_tensor]
    if isinstance(group, ArGroup):
        return f"{axes_of(group)} divides {' and '.join(divided)}"
    words = [f"tensor {group.parallel.tensor} divides the blocks of {', '.join(divided)}"] * bool(divided)
    copying = [axis for axis in ("ulysses", "ring", "cfg") if getattr(group.parallel, axis) > 1]
    if copying:
        one = len(copying) == 1
        does = "divides activations and work, and copies" if one else "divide activations and work, and copy"
        words.append(f"{' and '.join(copying)} {does} all weights")
    return "; ".join(words)


def _kv_cache(cache: KvCache) -> str:
    return (
        f"{cache.num_tokens:,} tokens, {cache.num_tokens / cache.max_model_len:.1f} requests of "
        f"max_model_len {cache.max_model_len:,} ({cache.gib_per_request:.1f} GiB each on a rank)"
    )


def _speed(need: Need, card: Card | None, num_nodes: int) -> str:
    if need.tokens_per_s is not None:
        return f"at most {need.tokens_per_s:.0f} tokens/s for one request (weights read once a token)"
    if need.estimate is None or need.request is None:
        why = "on a CPU" if card is None else f"for this model on a {card.name}"
        if card and num_nodes > 1 and not card.network_gbs:
            why += ", whose network the hardware table does not know"
        return f"not estimated {why}"
    what = "video" if need.request.frames > 1 else "image"
    return (
        f"{_seconds(need.estimate.seconds)} s per {what} of {need.request}, {need.request.steps} steps: "
        f"{need.estimate.forwards} forwards in turn, {need.estimate.tflop:,.0f} TFLOP each"
    )


def _network(estimate: Estimate, card: Card) -> str:
    parts = (f"{_seconds(seconds)} s for {axis}" for axis, seconds in estimate.network)
    return f"of these between nodes {' and '.join(parts)}, if it moves {card.network_gbs:g} GB/s per GPU"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
