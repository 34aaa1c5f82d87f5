"""Jobs through an engine loop in this process."""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.apply import Accelerators, accelerate
from omni_ray.accel.loader import Progress, load_pipeline, read_parts, resolve
from omni_ray.config.spec import Batching, DitGroup
from omni_ray.engine.loop import EngineLoop
from omni_ray.engine.media import eight_bits
from omni_ray.errors import EngineFailed
from omni_ray.messages import Failure, Job, Usage
from omni_ray.sources import resolve_source

Loading = tuple[Path, torch.dtype, torch.device, DitGroup, Progress]


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32


def in_a_thread(work: Callable[..., Any], *args: Any) -> Any:
    """Run ``work`` in a thread that ends, and with it its OpenMP pool: beside a second pool, that of the engine loop is
    half as fast."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work, *args).result()


def load(group: DitGroup) -> Any:
    """The pipeline of ``group`` on this machine's device, without accelerators."""
    return _load(_loading(group))


def prepare(group: DitGroup, mesh: DeviceMesh | None = None) -> tuple[Any, Accelerators]:
    """The pipeline of ``group`` with its accelerators, on a rank of ``mesh`` if there is one."""
    loading = _loading(group)
    pipe, device = _load(loading), loading[2]
    return pipe, accelerate(pipe, group, device, mesh, functools.partial(read_parts, pipe, *loading))


def _load(loading: Loading) -> Any:
    pipe = load_pipeline(*loading)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _loading(group: DitGroup) -> Loading:
    """What :func:`load_pipeline` and :func:`read_parts` have to know."""
    device, dtype = device_and_dtype()
    folder = resolve(resolve_source(group.source), group.allow_pickle_weights)
    return folder, dtype, device, group, lambda *_: None


def run(
    pipe: Any, jobs: Sequence[Job], batching: Batching, **loop_options: Any
) -> tuple[float, list[Any], list[Usage]]:
    """Seconds, images (or videos, of 8 bits and not encoded) and costs of jobs sent together to an engine loop.

    ``loop_options`` are those of :class:`EngineLoop`. Raises the error of a job that fails.
    """
    made: dict[str, Any] = {}

    def keep(output: Any, job: Job) -> tuple[()]:
        made[job.id] = _pixels(output)
        return ()

    device, _ = device_and_dtype()
    loop = EngineLoop(pipe, batching, device=device, encode=keep, **loop_options)
    ended: queue.SimpleQueue[Usage | Failure] = queue.SimpleQueue()
    loop.start()
    start = time.perf_counter()
    for job in jobs:
        loop.submit(job, lambda event: ended.put(event) if isinstance(event, (Usage, Failure)) else None)
    usages: dict[str, Usage] = {}
    try:
        for _ in jobs:
            event = _next(ended, loop)
            if isinstance(event, Failure):
                raise event.error
            usages[event.job_id] = event
        seconds = time.perf_counter() - start
    finally:
        loop.stop()
    return seconds, [made[job.id] for job in jobs], [usages[job.id] for job in jobs]


def _next(ended: queue.SimpleQueue[Usage | Failure], loop: EngineLoop) -> Usage | Failure:
    while True:
        try:
            return ended.get(timeout=5)
        except queue.Empty:
            if not loop.alive():
                raise EngineFailed("the engine loop has ended; the error is above") from None


def _pixels(output: Any) -> Any:
    """The first image [height, width, 3] or video [frames, height, width, 3]."""
    if (frames := getattr(output, "frames", None)) is None:
        return np.asarray(output.images[0])
    return eight_bits(np.stack([np.asarray(frame) for frame in frames[0]]))
