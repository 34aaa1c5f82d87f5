"""Runs a pipeline before its replica is routable, so that no request waits for the compiler."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from omni_ray.engine.loop import EngineLoop
from omni_ray.engine.media import blank_image
from omni_ray.errors import EngineFailed
from omni_ray.messages import Capabilities, Event, Failure, Job, Usage

Size = tuple[int, int]

ALONE_STEPS, TOGETHER_STEPS = 2, 4
"""Requests that come together may be a step apart before they are joined."""

PROMPT, LONGER = "warm-up", "warm-up " * 16
"""Texts of different lengths may need a mask, which is another graph."""

SIDE = 512
"""Of the requests that come together, in pixels: two of them fit into one forward."""


def warm_up(loop: EngineLoop, capabilities: Capabilities, complete: Callable[[Job], Job], *, joins: bool) -> None:
    """One request of the default size, and if the loop ``joins`` requests smaller ones by twos: of one request and of
    several the compiler makes a graph each, in which all other sizes are variables.

    Raises the error of a request that fails; EngineFailed where the loop ends.
    """
    default = capabilities.defaults.get("width", SIDE), capabilities.defaults.get("height", SIDE)
    _run(loop, [complete(_job("alone", PROMPT, default, ALONE_STEPS, capabilities))])
    if joins:
        small = min(default[0], SIDE), min(default[1], SIDE)
        for other in (PROMPT, LONGER):
            pair = enumerate((PROMPT, other))
            _run(loop, [complete(_job(str(i), prompt, small, TOGETHER_STEPS, capabilities)) for i, prompt in pair])


def _job(name: str, prompt: str, size: Size, num_steps: int, capabilities: Capabilities) -> Job:
    params = {"prompt": prompt, "num_inference_steps": num_steps, "width": size[0], "height": size[1]}
    return Job(
        id=f"warm-up-{name}",
        model="",
        group="",
        params={key: value for key, value in params.items() if key in capabilities.fields},
        images=(blank_image(size),) if "image" in capabilities.needs else (),
        mask=blank_image(size) if "mask" in capabilities.needs else None,
    )


def _run(loop: EngineLoop, jobs: Sequence[Job]) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for job in jobs:
        loop.submit(job, events.put)
    num_left = len(jobs)
    while num_left:
        try:
            event = events.get(timeout=1)
        except queue.Empty:
            if not loop.alive():
                raise EngineFailed("the engine's loop ended during the warm-up; its log says why") from None
            continue
        if isinstance(event, Failure):
            raise event.error
        num_left -= isinstance(event, Usage)
