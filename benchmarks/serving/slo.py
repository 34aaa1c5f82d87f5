"""Service level objectives: how long each class takes alone, and the deadlines that follow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from benchmarks.serving.client import Client, Target
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.request import Request


class WarmUpFailed(Exception):
    """A request of the warm-up failed; the text says which and why."""


async def measure_alone(requests: Sequence[Request], target: Target, num: int) -> dict[str, float]:
    """Seconds that a request of each class takes on the idle server: the shortest of ``num``, one after the other.

    Raises:
        WarmUpFailed: the server did not fulfil one of them.
    """
    alone_s: dict[str, float] = {}
    async with Client(target) as client:
        for label, request in {r.label: r for r in reversed(requests)}.items():
            outcomes = [await client.send(_other(request, i), i, time.monotonic()) for i in range(num)]
            for outcome in outcomes:
                if outcome.failure:
                    raise WarmUpFailed(f"the warm-up of {label!r} failed: {outcome.failure} {outcome.detail}".rstrip())
            alone_s[label] = min(outcome.total_s for outcome in outcomes)
    return alone_s


def _other(request: Request, number: int) -> Request:
    """A request of the same class with another beginning, so that no prefix cache keeps what the load asks for."""
    body = dict(request.body)
    if isinstance(body.get("prompt"), str):
        body["prompt"] = f"{'again ' * number}{body['prompt']}"
    if messages := body.get("messages"):
        body["messages"] = [{"role": "user", "content": f"warm up {number}"}, *messages[1:]]
        if isinstance(messages[0].get("content"), str):
            body["messages"][0] = messages[0] | {"content": f"warm up {number} {messages[0]['content']}"}
    return Request(request.kind, body)


def deadlines(alone_s: Mapping[str, float], slo_scale: float) -> dict[str, float]:
    """Seconds from the sending, by class."""
    return {label: slo_scale * seconds for label, seconds in alone_s.items()}


def in_time(outcome: Outcome, deadline_s: Mapping[str, float]) -> bool:
    """Whether the request succeeded by its deadline. One that failed or was refused did not."""
    return outcome.failure is None and outcome.total_s <= deadline_s[outcome.label]
