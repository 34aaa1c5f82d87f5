"""What the jobs of a DiT group cost, at /metrics."""

from __future__ import annotations

import re
import time

import httpx
import pytest

from tests.conftest import Server

pytestmark = pytest.mark.cluster

EXPORT_S = 40.0
"""How long it takes at most until a metric shows."""


def total(server: Server, name: str, **labels: str) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    lines = re.findall(rf"^ray_{name}\{{(.*)\}} (\S+)", page, re.M)
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for found, value in lines if all(each in found for each in wanted))


def test_steps_and_seconds_of_a_job_are_counted(server: Server) -> None:
    labels = {"model": "demo-image", "cache": "none", "result": "computed"}
    before = total(server, "omni_ray_steps_total", **labels)
    body = {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 7}
    cost = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["omni"]
    assert (cost["steps_computed"], cost["cache"], cost["warnings"]) == (7, "none", [])
    deadline = time.monotonic() + EXPORT_S
    while total(server, "omni_ray_steps_total", **labels) < before + 7:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert total(server, "omni_ray_jobs_total", model="demo-image", outcome="done") >= 1
    assert total(server, "omni_ray_device_seconds_total", model="demo-image") > 0
    assert total(server, "omni_ray_run_seconds_count", model="demo-image") >= 1
