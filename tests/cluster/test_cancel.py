"""A client that closes its connection ends the work of its request, and of no other."""

from __future__ import annotations

import concurrent.futures
import re
import time
from typing import Any

import httpx
import pytest

from tests.conftest import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

EXPORT_S = 12.0
"""How long it takes at most until a metric shows at /metrics."""


def leave_after(seconds: float, url: str, body: dict[str, Any]) -> None:
    """Send a request and close the connection."""
    timeout = httpx.Timeout(60, read=seconds)
    try:
        with httpx.stream("POST", url, json=body, timeout=timeout) as response:
            started = time.monotonic()
            for _ in response.iter_bytes():
                if time.monotonic() - started > seconds:
                    return
    except httpx.ReadTimeout:
        return
    pytest.fail("the request ended before its client left")


def test_an_image_that_nobody_waits_for(server: Server) -> None:
    url, image = f"{server.url}/v1/images/generations", {"model": "demo-image", "prompt": "a red circle"}
    other = image | {"num_inference_steps": 40, "seed": 3}
    alone = httpx.post(url, json=other, timeout=60).json()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        beside = pool.submit(httpx.post, url, json=other, timeout=60)
        leave_after(1.0, url, image | {"num_inference_steps": 200})
        reply = beside.result()
    assert reply.status_code == 200
    assert reply.json()["omni"]["steps_computed"] == 40
    ranks = server.find("ray::Rank", 2)  # those of demo-image and demo-video, which is idle
    leave_after(1.0, url, image | {"num_inference_steps": 200})
    time.sleep(0.5)  # one step is about a tenth of it
    before = sum(rank.cpu_times().user for rank in ranks)
    time.sleep(2.0)
    assert sum(rank.cpu_times().user for rank in ranks) - before < 0.4, "the rank still computes"
    assert httpx.post(url, json=other, timeout=60).json()["data"] == alone["data"]


def generated_tokens(server: Server) -> float:
    """Tokens that the engine has generated so far, all requests together."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(r"^ray_vllm_generation_tokens_total\{.*\} (\S+)", page, re.M))


def test_a_chat_that_nobody_reads(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    message = {"messages": [{"role": "user", "content": "a red circle"}]}
    chat = {"model": "demo-chat", "max_tokens": 1900, "ignore_eos": True, **message}
    time.sleep(EXPORT_S)
    before = generated_tokens(server)
    for stream in (True, False):
        leave_after(0.5, url, chat | {"stream": stream})
    time.sleep(EXPORT_S)
    assert generated_tokens(server) - before < 1900
