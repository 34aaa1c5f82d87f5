"""Jobs through an engine loop in this process, and pipelines as the benchmarks load them."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from omni_ray.accel.loader import load_pipeline, resolve
from omni_ray.config.spec import DitGroup
from omni_ray.engine import lane
from omni_ray.engine.loop import EngineLoop
from omni_ray.messages import Failure, Job, Usage
from omni_ray.sources import resolve_source


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32


def load(group: DitGroup) -> Any:
    """The pipeline of ``group`` on this machine's device, without accelerators."""
    device, dtype = device_and_dtype()
    pipe = load_pipeline(resolve(resolve_source(group.source)), dtype, device, group, lambda *_: None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(loop: EngineLoop, jobs: Sequence[Job]) -> tuple[float, list[Any], list[Usage]]:
    """Seconds, images (8 bits, before they are encoded) and costs of jobs sent together. Starts and stops ``loop``."""
    images: dict[str, Any] = {}
    lane.encode_outputs = lambda output, job: iter(images.update({job.id: np.asarray(output.images[0])}) or ())  # type: ignore[assignment]
    ended: queue.SimpleQueue[Usage | Failure] = queue.SimpleQueue()
    loop.start()
    start = time.perf_counter()
    for job in jobs:
        loop.submit(job, lambda event: ended.put(event) if isinstance(event, (Usage, Failure)) else None)
    usages: dict[str, Usage] = {}
    for _ in jobs:
        if isinstance(event := ended.get(), Failure):
            raise event.error
        usages[event.job_id] = event
    seconds = time.perf_counter() - start
    loop.stop()
    return seconds, [images[job.id] for job in jobs], [usages[job.id] for job in jobs]


def psnr(first: Sequence[Any], second: Sequence[Any]) -> float:
    """dB of the mean error of all pixels of 8 bits; inf is bit for bit."""
    errors = [np.mean((a.astype(float) - b.astype(float)) ** 2) for a, b in zip(first, second, strict=True)]
    error = float(np.mean(errors))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
