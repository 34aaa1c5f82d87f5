"""Builds the Ray Serve application from a spec: the one file that sees every hop.

Api  ->  Router  ->  DiT group (DitReplica -> Gang of Ranks)
  \\->  AR group (ArReplica, vLLM)
"""

# No `from __future__ import annotations` here: Ray Serve checks the YAML by the type of `build`'s argument.

import functools
import math
from typing import Any

import ray
from ray import serve

from omni_ray.api.app import Api
from omni_ray.config.serve_file import deployment_name
from omni_ray.config.spec import ArGroup, DitGroup, OmniSpec
from omni_ray.engine.gang import Gang
from omni_ray.errors import ConfigError
from omni_ray.plan.inventory import Inventory, unknown_node
from omni_ray.plan.placement import Placement
from omni_ray.plan.plan import make_plan
from omni_ray.replica import prefix, scaling
from omni_ray.replica.ar import ArReplica
from omni_ray.replica.dit import DitReplica
from omni_ray.router import balance
from omni_ray.router.router import Router
from omni_ray.sources import resolve_source

HEALTH = {"health_check_period_s": 1, "health_check_timeout_s": 10, "graceful_shutdown_timeout_s": 20}

SOME_CPU = 0.01
"""Keeps an actor off nodes without CPUs."""


def build(args: OmniSpec) -> serve.Application:
    """The application that serves ``args``. Called by ``serve run`` with the YAML's ``args``, checked."""
    spec = args
    plan = make_plan(spec, _inventory())
    if refusals := [str(refusal) for refusal in plan.refusals if refusal.is_final]:
        raise ConfigError("\n".join(refusals))
    dit = {g.id: _dit_group(g, plan.placement(g.id)) for g in spec.groups if isinstance(g, DitGroup)}
    ar = {g.id: _ar_group(g, spec, plan.placement(g.id)) for g in spec.groups if isinstance(g, ArGroup)}
    deployments = {g.id: deployment_name(g.id) for g in spec.groups}
    num_nodes, actor_options = _edge()
    router = serve.deployment(Router).options(
        name="Router", max_ongoing_requests=100_000, ray_actor_options=actor_options, **HEALTH
    )
    api = serve.deployment(Api).options(
        name="Api",
        num_replicas=spec.api.num_replicas,
        max_replicas_per_node=math.ceil(spec.api.num_replicas / num_nodes),
        max_ongoing_requests=10_000,
        ray_actor_options=actor_options,
        **HEALTH,
    )
    return api.bind(spec, router.bind(spec, dit, deployments), ar)


def _edge() -> tuple[int, dict[str, float]]:
    """Over how many nodes router and ingress spread, and what an actor of theirs asks of Ray: nothing, unless a node
    has no CPUs, such as a head that is to run nothing which its loss would take along."""
    nodes = _alive_nodes()
    for_work = [node for node in nodes if node["Resources"].get("CPU")]
    return max(len(for_work), 1), {"num_cpus": 0 if len(for_work) == len(nodes) else SOME_CPU}


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []


def _dit_group(group: DitGroup, placement: Placement) -> serve.Application:
    launch = functools.partial(_launch_gang, source=resolve_source(group.source), num_gpus=placement.num_gpus)
    return (
        serve.deployment(DitReplica)
        .options(
            **_group_options(group, placement),
            max_ongoing_requests=group.batching.max_num_seqs + 4,
            request_router_config=balance.request_router_config(),
        )
        .bind(group, launch)
    )


def _launch_gang(group: DitGroup, replica_id: str, source: str, num_gpus: float) -> Gang:
    return Gang(group, source, num_gpus, replica_id)


def _ar_group(group: ArGroup, spec: OmniSpec, placement: Placement) -> serve.Application:
    options = _group_options(group, placement)
    if placement.num_ranks == 1:  # its engine is a child of the replica, and sees the GPU that Ray gave to the replica
        options["ray_actor_options"]["num_gpus"] = placement.num_gpus
    return (
        serve.deployment(ArReplica)
        .options(
            **options,
            max_ongoing_requests=group.max_ongoing_requests,
            max_queued_requests=group.queue.max_queued_requests,
            request_router_config=prefix.request_router_config(group.routing),
        )
        .bind(spec, group, resolve_source(group.source))
    )


def _group_options(group: ArGroup | DitGroup, placement: Placement) -> dict[str, Any]:
    """One replica is one placement group, the plan's; the replica's own process shares its first bundle."""
    options: dict[str, Any] = {
        "name": deployment_name(group.id),
        "placement_group_bundles": placement.bundles,
        "placement_group_strategy": placement.strategy,
        "ray_actor_options": {"num_cpus": 0},
        **HEALTH,
        "graceful_shutdown_timeout_s": group.drain_s,
    }
    if group.autoscaling:
        options["autoscaling_config"] = scaling.config_of(group)
    else:
        options["num_replicas"] = group.num_replicas
    return options


def _inventory() -> Inventory:
    """The nodes that the cluster has now, by their number of GPUs. What their cards hold Ray does not tell."""
    alive = [(node["NodeName"], math.ceil(node["Resources"].get("GPU", 0))) for node in _alive_nodes()]
    return tuple(unknown_node(name, num_gpus) for name, num_gpus in alive or [("here", 0)])
