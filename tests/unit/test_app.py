"""Where the application's own processes may run."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from omni_ray.app import SOME_CPU, build
from omni_ray.config.spec import OmniSpec

MODEL = {"name": "m", "type": "dit", "source": "demo:image"}


def edge(monkeypatch: pytest.MonkeyPatch, *num_cpus: float) -> list[Any]:
    """The options of ingress and router on a cluster of such nodes."""
    nodes = [{"NodeName": f"n{i}", "Alive": True, "Resources": {"CPU": n} if n else {}} for i, n in enumerate(num_cpus)]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    api = build(OmniSpec.model_validate({"models": [MODEL], "api": {"num_replicas": 2}}))._bound_deployment
    router = api.init_args[1]._bound_deployment
    per_node = api._replica_config.max_replicas_per_node
    return [per_node, *(each.ray_actor_options["num_cpus"] for each in (api, router))]


def test_ingress_and_router_keep_off_a_head_that_has_no_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert edge(monkeypatch, 0, 2, 2) == [1, SOME_CPU, SOME_CPU]


def test_they_ask_for_nothing_where_every_node_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert edge(monkeypatch, 2) == [2, 0, 0]
    assert edge(monkeypatch, 2, 2, 2) == [1, 0, 0]


def test_a_group_says_how_long_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    api = build(OmniSpec.model_validate({"models": [MODEL | {"drain_s": 300}]}))._bound_deployment
    group = api.init_args[1]._bound_deployment.init_args[1]["m"]._bound_deployment
    assert group._deployment_config.graceful_shutdown_timeout_s == 300
    assert api._deployment_config.graceful_shutdown_timeout_s == 20
