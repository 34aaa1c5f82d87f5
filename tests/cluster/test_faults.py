"""SIGKILL in the middle of 50 mixed requests: what had not begun to stream is answered all the same."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import httpx
import pytest

from tests.conftest import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
WORDS = {"model": "demo-chat", "messages": [{"role": "user", "content": "a red circle"}]}
CHATS: list[tuple[str, dict[str, Any]]] = [(CHAT, WORDS | {"max_tokens": 600, "ignore_eos": True})] * 15
STREAMS: list[tuple[str, dict[str, Any]]] = [(path, body | {"stream": True}) for path, body in CHATS]
DRAWINGS: list[tuple[str, dict[str, Any]]] = [
    (IMAGES, {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 6 + i % 5, "seed": i})
    for i in range(20)
]


def send(server: Server, path: str, body: dict[str, Any]) -> str:
    """How the request ended: ``answer``, ``error`` in a stream that had begun, or the status and body."""
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=300)
    if reply.status_code != 200:
        return f"{reply.status_code}: {reply.text}"
    if not body.get("stream"):
        return "answer"
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    return "answer" if events[-1] == "[DONE]" else next(iter(json.loads(events[-1])))


@pytest.mark.parametrize(
    ("victim", "num"),
    [
        ("ray::Rank", 2),
        pytest.param("ray::ServeReplica:omni:demo-image", 1, marks=pytest.mark.thorough),
        pytest.param("ray::ServeReplica:omni:demo-chat", 1, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_process(server: Server, victim: str, num: int) -> None:
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        running = {
            kind: [pool.submit(send, server, path, body) for path, body in requests]
            for kind, requests in {"chats": CHATS, "streams": STREAMS, "drawings": DRAWINGS}.items()
        }
        time.sleep(1.5)
        for process in server.find(victim, num):
            process.kill()
        ended = {kind: [each.result() for each in futures] for kind, futures in running.items()}
    assert set(ended["chats"]) == {"answer"}
    assert set(ended["drawings"]) == {"answer"}
    assert set(ended["streams"]) <= {"answer", "error"}
    server.wait_ready()
    for path, body in (CHATS[0], DRAWINGS[0]):
        assert send(server, path, body) == "answer"
