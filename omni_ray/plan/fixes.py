"""The smallest changes that make a refused plan fit, each tried by planning again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from omni_ray.config.spec import ArParallel, DitGroup, OmniSpec
from omni_ray.plan.cards import CARDS, Card
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.placement import num_replicas
from omni_ray.plan.plan import GroupPlan, Plan, make_plan

MAX_FIXES = 4
MAX_CHOICES = 100_000
MAX_TRIALS = 300
MAX_UTILIZATION = 0.95
DEGREES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
LENGTHS = (32768, 16384, 8192, 4096)


@dataclass(frozen=True)
class Change:
    """New values of keys of a model, by their dotted paths, and what they cost. A lower ``cost`` comes first."""

    index: int
    values: tuple[tuple[str, Any], ...]
    cost: float
    price: str

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.values)


@dataclass(frozen=True)
class Fix:
    """Changes that together leave nothing refused, or other cards that do."""

    changes: tuple[Change, ...]
    result: str
    card: Card | None = None

    def __str__(self) -> str:
        if self.card:
            return f"cards of {self.card.gib:.0f} GiB or more, such as {self.card.name} (then the file fits as it is)"
        words = " and ".join(f"models[{change.index}] {change}" for change in self.changes)
        return f"{words} ({', '.join(dict.fromkeys(change.price for change in self.changes))}; then {self.result})"

    @property
    def keys(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Which keys it changes, whatever to."""
        return tuple((change.index, tuple(path for path, _ in change.values)) for change in self.changes)


def find_fixes(plan: Plan) -> list[Fix]:
    """At most a few fixes that change different keys, the cheapest first; empty where nothing makes everything fit."""
    search = _Search(plan)
    refused = [group for group in plan.groups if group.refusals]
    if not refused:
        return []
    changes = [sorted(_candidates(group, plan), key=lambda each: each.cost) for group in refused]
    useful = [[(), *((change,) for change in each if search.helps(change))] for each in changes]
    found = search.first_of(tuple(itertools.chain(*choice)) for choice in itertools.product(*useful))
    if not found:
        pairs = itertools.chain(*(itertools.combinations(each, 2) for each in changes))
        found = search.first_of(pair for pair in pairs if not _overlap(pair))
    return found + search.other_cards()


class _Search:
    """Plans again and again."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._read = functools.cache(read_checkpoint)

    def helps(self, change: Change) -> bool:
        """Whether less is refused with the change alone."""
        again = self._again((change,))
        return again is not None and len(again.refusals) < len(self._plan.refusals)

    def first_of(self, choices: Iterable[tuple[Change, ...]]) -> list[Fix]:
        """The cheapest choices that work, one for each set of keys."""
        found: dict[Any, Fix] = {}
        cheapest = sorted(itertools.islice(filter(None, choices), MAX_CHOICES), key=_cost)
        for choice in cheapest[:MAX_TRIALS]:
            fix = Fix(choice, "")
            if fix.keys in found or len(found) == MAX_FIXES:
                continue
            again = self._again(choice)
            if again and not again.refusals:
                indices = {change.index for change in choice}
                groups = [group for group in again.groups if group.index in indices]
                found[fix.keys] = Fix(choice, ", ".join(dict.fromkeys(map(_result, groups))))
        return list(found.values())

    def other_cards(self) -> list[Fix]:
        """The smallest card of the hardware table on which the spec fits as it is, where memory is what lacks."""
        plan = self._plan
        if all(refusal.key != "memory" for refusal in plan.refusals):
            return []
        now = max((node.card.gib for node in plan.inventory if node.card), default=math.inf)
        for card in sorted(CARDS.values(), key=lambda each: each.gib):
            inventory = tuple(dataclasses.replace(node, card=card) if node.card else node for node in plan.inventory)
            if card.gib > now and not make_plan(plan.spec, inventory, read=self._read).refusals:
                return [Fix((), "", card)]
        return []

    def _again(self, changes: tuple[Change, ...]) -> Plan | None:
        """The plan with the changes; None where the spec refuses them."""
        try:
            spec = apply(self._plan.spec, changes)
        except ValidationError:
            return None
        return make_plan(spec, self._plan.inventory, copy.deepcopy(self._plan.free), self._read)


def _cost(changes: tuple[Change, ...]) -> float:
    return sum(change.cost for change in changes)


def _overlap(changes: tuple[Change, ...]) -> bool:
    paths = [path for change in changes for path, _ in change.values]
    return len(set(paths)) < len(paths)


def _result(group: GroupPlan) -> str:
    assert group.need is not None
    memory = group.need.memory
    if memory.kv_cache:
        return f"KV cache for {memory.kv_cache.num_tokens:,} tokens on {_gpus(group)}"
    return f"{memory.needed_gib:.1f} of {memory.budget_gib:.1f} GiB a rank on {_gpus(group)}"


def _gpus(group: GroupPlan) -> str:
    return gpus(num_replicas(group.group) * group.placement.num_ranks * group.placement.num_gpus)


def gpus(number: float) -> str:
    return f"{number:g} GPU" + ("s" if number != 1 else "")


def apply(spec: OmniSpec, changes: tuple[Change, ...]) -> OmniSpec:
    """The spec with the changes, checked as a file's would be. Raises ValidationError where it refuses them."""
    data = copy.deepcopy(spec.model_dump(exclude_unset=True))
    for change in changes:
        for path, value in change.values:
            block = data["models"][change.index]
            *parents, key = path.split(".")
            for parent in parents:
                block = block.setdefault(parent, {})
            block[key] = value
    return OmniSpec.model_validate(data)


def _candidates(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    """Changes that might help, with what they cost, from nothing to many GPUs."""
    group = plan.group
    keys = {refusal.key for refusal in plan.refusals}
    if "memory" in keys:
        yield from _memory_changes(plan)
        yield from _dit_axes(plan, whole) if isinstance(group, DitGroup) else _ar_axes(plan, whole)
        yield from _more_nodes(plan, whole)
    if "parallel" in keys:
        yield from _other_nodes(plan, whole)
    if "parallel" in keys and "memory" not in keys:
        yield from _dit_axes(plan, whole) if isinstance(group, DitGroup) else _ar_axes(plan, whole)
    if "num_replicas" in keys:
        yield from _fewer_replicas(plan, whole)
        if group.num_gpus < 1:
            yield Change(plan.index, (("num_gpus", 1.0),), 4, "a GPU for each rank")
    if "device" in keys:
        yield Change(plan.index, (("device", "auto"),), 1, "runs on CPUs")


def _memory_changes(plan: GroupPlan) -> Iterator[Change]:
    assert plan.need is not None
    group, index, memory = plan.group, plan.index, plan.need.memory
    if plan.card and group.memory.gpu_memory_utilization < MAX_UTILIZATION:
        change = ("memory.gpu_memory_utilization", MAX_UTILIZATION)
        yield Change(index, (change,), 1, "less room for other programs on the card")
    if group.dtype == "float32":
        yield Change(index, (("dtype", "bfloat16"),), 2, "numbers keep 8 bits")
    if isinstance(group, DitGroup):
        if group.batching.max_num_batched_tokens > 1:
            yield Change(index, (("batching.max_num_batched_tokens", 1),), 2, "requests share no forward")
        if plan.card:
            yield from _dit_levers(index, group)
        return
    if memory.kv_cache is None:
        return
    name = next((key for key in group.engine_args if key.replace("-", "_") == "max_model_len"), "max_model_len")
    for cost, length in enumerate(LENGTHS):
        if length < memory.kv_cache.max_model_len:
            change = (f"engine_args.{name}", length)
            yield Change(index, (change,), 3 + cost / 10, "shorter prompts and answers")
    if group.quantization is None and plan.card:
        yield Change(index, (("quantization", "fp8"),), 4, "weights in 8 bits")
    over = memory.needed_gib - memory.budget_gib
    offloaded = group.offload.cpu_offload_gb + float(int(over) + 1)
    if plan.card:
        price = f"reads {offloaded:g} GiB over PCIe for every token"
        yield Change(index, (("offload.cpu_offload_gb", offloaded),), 9, price)


def _dit_levers(index: int, group: DitGroup) -> Iterator[Change]:
    """Fewer bits, weights in host memory, or less at once."""
    if group.offload.kind == "none":
        yield Change(index, (("offload.kind", "sequential"),), 3, "each request brings its weights over PCIe")
        yield Change(index, (("offload.kind", "layerwise"),), 8, "each step streams its weights over PCIe")
    if group.quantization.kind == "none":
        yield Change(index, (("quantization.kind", "int8"),), 4, "weights in 8 bits")
    if group.records_on_gpus:
        yield Change(index, (("compile.cuda_graphs", False),), 1.5, "the host launches every kernel")
    if not group.vae.tiling:
        yield Change(index, (("vae.tiling", True),), 2.2, "large pictures are decoded in tiles")


def _dit_axes(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    """Other degrees of the axes. To exchange one axis for another is cheaper than to take or lose GPUs."""
    assert isinstance(plan.group, DitGroup)
    now = plan.group.parallel
    most = max((node.num_gpus for node in whole.inventory), default=0) * now.num_nodes or now.num_ranks
    for tensor, ulysses, ring in itertools.product(DEGREES, DEGREES, {1, now.ring}):
        values = {"tensor": tensor, "ulysses": ulysses, "ring": ring}
        changed = tuple((f"parallel.{axis}", degree) for axis, degree in values.items() if getattr(now, axis) != degree)
        ranks = now.cfg * tensor * ulysses * ring
        if changed and ranks <= most:
            yield _axes_change(plan, changed, ranks)


def _ar_axes(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    now = plan.group.parallel
    most = max((node.num_gpus for node in whole.inventory), default=0) * now.num_nodes or now.num_ranks
    for tensor in DEGREES:
        ranks = now.num_ranks // now.tensor * tensor
        if tensor != now.tensor and ranks <= most:
            yield _axes_change(plan, (("parallel.tensor", tensor),), ranks)


def _other_nodes(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    """The same ranks over more nodes, or fewer."""
    now = plan.group.parallel
    for number in range(1, min(len(whole.inventory), now.num_ranks) + 1):
        if number != now.num_nodes and now.num_ranks % number == 0:
            price = "ranks talk through the network" if number > now.num_nodes else "as many GPUs on fewer nodes"
            cost = (4 if number > now.num_nodes else 1) + number / 100
            yield Change(plan.index, (("parallel.num_nodes", number),), cost, price)


def _more_nodes(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    """An LLM's layers over several nodes, as many ranks on each as now."""
    now = plan.group.parallel
    if not isinstance(now, ArParallel) or not plan.placement.num_gpus:
        return
    for times in range(2, len(whole.inventory) // now.num_nodes + 1):
        changed = (("parallel.pipeline", now.pipeline * times), ("parallel.num_nodes", now.num_nodes * times))
        yield _axes_change(plan, changed, now.num_ranks * times)


def _axes_change(plan: GroupPlan, changed: tuple[tuple[str, Any], ...], ranks: int) -> Change:
    more = ranks - plan.group.parallel.num_ranks
    distance = sum(abs(_was(plan, path) - value) for path, value in changed)
    if more == 0:
        return Change(plan.index, changed, 2.5 + distance / 100, "another axis on as many GPUs")
    price = f"{gpus(more)} more a replica" if more > 0 else f"{gpus(-more)} fewer a replica, so slower"
    return Change(plan.index, changed, 5 + abs(more) / 4 + distance / 100, price)


def _was(plan: GroupPlan, path: str) -> int:
    return int(getattr(plan.group.parallel, path.removeprefix("parallel.")))


def _fewer_replicas(plan: GroupPlan, whole: Plan) -> Iterator[Change]:
    """Of the group itself, as many as have room; or so many fewer of another that there is room for all."""
    if plan.seats:
        yield _replicas(plan, len(plan.seats), 3)
    missing = (num_replicas(plan.group) - len(plan.seats)) * plan.placement.num_ranks * plan.placement.num_gpus
    for other in whole.groups:
        gpus_each = other.placement.num_ranks * other.placement.num_gpus
        if other.index != plan.index and gpus_each:
            left = num_replicas(other.group) - math.ceil(missing / gpus_each)
            if left > 0:
                yield _replicas(other, left, 3.5)


def _replicas(plan: GroupPlan, number: int, cost: float) -> Change:
    key = "autoscaling.max_replicas" if plan.group.autoscaling else "num_replicas"
    return Change(plan.index, ((key, number),), cost, "fewer replicas, so less throughput")
