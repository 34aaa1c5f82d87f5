"""The router, a DiT replica and the ingress killed while 20 jobs run: each ends done, once, with the right media."""

from __future__ import annotations

import concurrent.futures
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.chaos.compare import same
from tests.conftest import Server

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]

VICTIMS = ("Router", "demo-image", "Api")
NUM_IMAGES, NUM_VIDEOS = 14, 6
RESTART_S = 30.0
"""Two processes of Ray Serve have to notice, and a new one has to start, on crowded cores."""


@dataclass
class Asked:
    """A job and what its client saw: ``gap_s`` is the longest time without an answer to its polls."""

    path: str
    body: dict[str, Any]
    id: str = ""
    status: str = ""
    gap_s: float = 0.0
    data: bytes = b""


def requests(offset: int) -> list[Asked]:
    image = {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 12, "async": True}
    video = {"model": "demo-video", "prompt": "a red circle moving right", "num_inference_steps": 8}
    images = [Asked("/v1/images/generations", image | {"seed": offset + i}) for i in range(NUM_IMAGES)]
    return images + [Asked("/v1/videos", video | {"seed": offset + i}) for i in range(NUM_VIDEOS)]


def submit(client: httpx.Client, asked: Asked) -> None:
    reply = client.post(asked.path, json=asked.body)
    assert reply.status_code in (200, 202), reply.text
    asked.id = reply.json()["id"]


def follow(client: httpx.Client, asked: Asked, deadline: float) -> None:
    """Poll until the job is over, then fetch what it made."""
    answered = time.monotonic()
    while asked.status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, f"{asked.id} is still {asked.status}"
        try:
            reply = client.get(f"/v1/jobs/{asked.id}")
        except httpx.TransportError:
            reply = None
        if reply is not None and reply.status_code == 200:
            asked.status = reply.json()["status"]
            asked.gap_s, answered = max(asked.gap_s, time.monotonic() - answered), time.monotonic()
        time.sleep(0.5)
    content = client.get(f"/v1/jobs/{asked.id}/content")
    asked.data = content.content if content.status_code == 200 else b""


def all_ids(server: Server) -> list[str]:
    ids: list[str] = []
    while True:
        after = {"after": ids[-1]} if ids else {}
        page = httpx.get(f"{server.url}/v1/jobs", params={"limit": "100", **after}, timeout=30).json()
        ids += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            return ids


def run_all(server: Server, jobs: list[Asked], victim: str | None) -> None:
    limits = httpx.Limits(max_connections=len(jobs))
    with (
        httpx.Client(base_url=server.url, timeout=30, limits=limits) as client,
        concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool,
    ):
        list(pool.map(lambda each: submit(client, each), jobs))
        following = [pool.submit(follow, client, each, time.monotonic() + 240) for each in jobs]
        if victim:
            time.sleep(2)
            server.find(f"ray::ServeReplica:omni:{victim}")[0].kill()
        for each in following:
            each.result()


@pytest.fixture(scope="module")
def fault_free(server: Server) -> list[Asked]:
    jobs = requests(0)
    run_all(server, jobs, None)
    return jobs


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_costs_no_job(server: Server, fault_free: list[Asked], victim: str) -> None:
    server.wait_ready()
    before, jobs = all_ids(server), requests(0)
    run_all(server, jobs, victim)
    assert [each.status for each in jobs] == ["completed"] * len(jobs)
    for made, wanted in zip(jobs, fault_free, strict=True):
        assert same(made.data, wanted.data), made
    assert sorted(all_ids(server)) == sorted([*before, *(each.id for each in jobs)])
    assert max(each.gap_s for each in jobs) < RESTART_S
