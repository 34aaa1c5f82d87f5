"""Sends a workload from several client processes, so that reading many streams does not slow the clock."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import uvloop
from tqdm import tqdm

from benchmarks.serving.client import Client, Target
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.request import Request

LEAD_S = 0.2
"""From the start of the client processes to the first arrival."""


@dataclass(frozen=True)
class Load:
    """``max_concurrency`` requests in flight at most (None: no limit), each sent again up to ``retries`` times when the
    server refuses it and says when to come back."""

    target: Target
    max_concurrency: int | None = None
    retries: int = 0
    num_clients: int = 4


@dataclass(frozen=True)
class Run:
    outcomes: list[Outcome]
    duration_s: float
    """From the start to the end of the last request."""


_shared: Any = None
"""In a client process: the requests, and the counters that all client processes share."""


def _share(*shared: Any) -> None:
    global _shared
    _shared = shared
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # a hard limit without end cannot be asked for everywhere
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))


def run(requests: Sequence[Request], load: Load, show_progress: bool = True) -> Run:
    """Send every request at its arrival, or as soon after as the limit allows, and wait for all."""
    num_clients = min(load.num_clients, len(requests), load.max_concurrency or len(requests))
    fork = multiprocessing.get_context("fork")
    taken, ended, failed = (fork.Value("l", 0) for _ in range(3))
    with ProcessPoolExecutor(num_clients, fork, _share, (requests, taken, ended, failed)) as pool:
        start = time.monotonic() + LEAD_S
        places = [len(range(i, load.max_concurrency or len(requests), num_clients)) for i in range(num_clients)]
        parts = [pool.submit(_client_process, load, share, start) for share in places]
        with tqdm(total=len(requests), unit="req", disable=not show_progress) as bar:
            while not all(part.done() for part in parts):
                _show(bar, ended.value, failed.value)
                time.sleep(0.1)
            _show(bar, ended.value, failed.value)
        outcomes = [outcome for part in parts for outcome in part.result()]
    outcomes.sort(key=lambda outcome: (outcome.index, outcome.attempt))
    return Run(outcomes, max(outcome.end_s for outcome in outcomes))


def _show(bar: Any, num_ended: int, num_failed: int) -> None:
    bar.set_postfix_str(f"{num_failed} failed" if num_failed else "", refresh=False)
    bar.update(num_ended - bar.n)


def _client_process(load: Load, places: int, start: float) -> list[Outcome]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_send_all(load, places, start))


async def _send_all(load: Load, places: int, start: float) -> list[Outcome]:
    """Take requests in the order of their arrival until none is left. Other processes take from the same."""
    requests, taken, ended, failed = _shared
    free = asyncio.Semaphore(places if load.max_concurrency else len(requests))
    outcomes: list[Outcome] = []

    async def follow(index: int) -> None:
        try:
            outcomes.extend(await _send(client, load, requests[index], index, start))
        finally:
            free.release()
        _count(ended)
        if outcomes[-1].failure:
            _count(failed)

    async with Client(load.target) as client, asyncio.TaskGroup() as group:
        while True:
            await free.acquire()
            if (index := _count(taken)) >= len(requests):
                return outcomes
            await asyncio.sleep(max(0.0, start + requests[index].at_s - time.monotonic()))
            group.create_task(follow(index))


async def _send(client: Client, load: Load, request: Request, index: int, start: float) -> list[Outcome]:
    outcomes = [await client.send(request, index, start)]
    while outcomes[-1].retry_after_s is not None and outcomes[-1].refused and len(outcomes) <= load.retries:
        await asyncio.sleep(outcomes[-1].retry_after_s)
        outcomes.append(await client.send(request, index, start, attempt=len(outcomes)))
    return outcomes


def _count(counter: Any) -> int:
    """Count one up; the number before."""
    with counter.get_lock():
        number = int(counter.value)
        counter.value = number + 1
    return number
