"""``omni-ray plan FILE``: what would run where, whether it fits, and how fast, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from omni_ray.config.load import load
from omni_ray.config.spec import OmniSpec
from omni_ray.errors import ConfigError
from omni_ray.plan.fixes import find_fixes
from omni_ray.plan.inventory import local_inventory, parse_inventory
from omni_ray.plan.placement import Free
from omni_ray.plan.plan import Plan, make_plan
from omni_ray.plan.report import report


def plan(path: str, inventory: Sequence[str]) -> int:
    """Print the plan of each application of the file. 0 when everything fits, 1 when something is refused.

    Raises:
        ConfigError: the file cannot be served, or a checkpoint's sizes are nowhere on this machine.
    """
    plans = plans_of(load(path), inventory)
    print("\n\n".join(report(each, find_fixes(each)) for each in plans))
    return 1 if any(each.refusals for each in plans) else 0


def plans_of(specs: Sequence[OmniSpec], inventory: Sequence[str]) -> list[Plan]:
    """A plan of each spec, one after the other on the same nodes: those described, or without a description this one.

    Raises:
        ConfigError: a checkpoint's sizes are nowhere on this machine.
    """
    nodes = parse_inventory(inventory) if inventory else local_inventory()
    free = Free(nodes)
    plans = [make_plan(spec, nodes, free) for spec in specs]
    if unknown := [group.unknown for each in plans for group in each.groups if group.unknown]:
        raise ConfigError("\n".join(unknown))
    return plans
