"""A rank: one process on one device, which holds the pipeline's weights and runs the engine loop. A Ray actor."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from omni_ray.config.spec import DitGroup
from omni_ray.messages import Capabilities, Event, Failure, Job, LoadProgress, Usage

if TYPE_CHECKING:
    from omni_ray.engine.loop import EngineLoop

Report = Callable[..., None]


class Rank:
    """Rank ``index`` of a gang. Its methods are called through Ray by the replica that owns the gang."""

    def __init__(self, group: DitGroup, source: str, index: int, replica_id: str) -> None:
        self._group = group
        self._source = source
        self._index = index
        self._replica_id = replica_id
        self._loop: EngineLoop | None = None
        self._capabilities: Capabilities | None = None

    async def load(self) -> AsyncIterator[LoadProgress | Capabilities]:
        """Load and prepare the pipeline. Yields progress, and last what the pipeline accepts."""
        progress: asyncio.Queue[LoadProgress | None] = asyncio.Queue()
        main = asyncio.get_running_loop()

        def report(phase: Any, done: int = 0, total: int = 0, detail: str = "") -> None:
            step = LoadProgress(
                group=self._group.id,
                replica_id=self._replica_id,
                phase=phase,
                done_bytes=done,
                total_bytes=total,
                detail=detail,
            )
            main.call_soon_threadsafe(progress.put_nowait, step)

        # A thread that ends takes its OpenMP pool along; beside a second pool, the loop's would sleep between any two
        # loops of a kernel, as there would be more threads than cores.
        loader = ThreadPoolExecutor(max_workers=1)
        loading = main.run_in_executor(loader, self._load, report)
        loader.shutdown(wait=False)
        loading.add_done_callback(lambda _: progress.put_nowait(None))
        while (step := await progress.get()) is not None:
            yield step
        self._capabilities = await loading
        yield self._capabilities

    def _load(self, report: Report) -> Capabilities:
        import torch  # here, since the process that owns the gang imports this module and needs no torch

        from omni_ray.accel.attention import apply_attention
        from omni_ray.accel.capabilities import read_capabilities
        from omni_ray.accel.compile import apply_compile
        from omni_ray.accel.loader import load_pipeline, resolve
        from omni_ray.engine.loop import EngineLoop

        group = self._group
        device = torch.device("cuda" if group.device != "cpu" and torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(group.memory.gpu_memory_utilization)
        else:
            torch.set_num_threads(os.cpu_count() or 1)
        folder = resolve(self._source)
        dtype = group.dtype if group.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        pipe = load_pipeline(
            folder, getattr(torch, dtype), device, group, lambda *seen: report("loading weights", *seen)
        )
        apply_attention(pipe, group.attention)
        apply_compile(pipe, group.compile)
        capabilities = read_capabilities(pipe, folder, group)
        self._loop = EngineLoop(pipe, group.batching)
        self._loop.start()
        if group.compile.mode != "none":
            report("compiling")
            self._warm_up(capabilities)
        return capabilities

    def _warm_up(self, capabilities: Capabilities) -> None:
        """Run the pipeline once for two steps, so that no request waits for the compiler."""
        job = Job(
            id=f"warm-up-{self._replica_id}",
            model=self._group.name,
            group=self._group.id,
            params={"prompt": "warm-up", "num_inference_steps": 2},
        )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._engine.submit(self._complete(job, capabilities), events.put)
        while not isinstance(event := events.get(), Usage):
            if isinstance(event, Failure):
                raise event.error

    @property
    def _engine(self) -> EngineLoop:
        assert self._loop is not None, "load() comes first"
        return self._loop

    @staticmethod
    def _complete(job: Job, capabilities: Capabilities) -> Job:
        """Fill in the seed and the defaults that the request left open."""
        seed = random.SystemRandom().randrange(2**32) if job.seed is None else job.seed
        return dataclasses.replace(job, seed=seed, params=capabilities.defaults | job.params)

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events; the last one is a Usage or a Failure. Closing the iterator cancels the job."""
        assert self._capabilities is not None
        events: asyncio.Queue[Event] = asyncio.Queue()
        main = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            main.call_soon_threadsafe(events.put_nowait, event)

        self._engine.submit(self._complete(job, self._capabilities), emit)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, (Usage, Failure)):
                    return
        finally:
            self._engine.cancel(job.id)

    async def cancel(self, job_id: str) -> None:
        self._engine.cancel(job_id)

    async def join(self) -> None:
        """Return when the engine loop ends. It does not by itself: a call that waits here ends with the rank."""
        while self._loop is None or self._loop.alive():
            await asyncio.sleep(0.5)
