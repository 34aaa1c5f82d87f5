"""A rank: one process on one device, which holds the pipeline's weights and runs the engine loop. A Ray actor."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray

from omni_ray.config.spec import DitGroup
from omni_ray.engine.meters import RankMeters
from omni_ray.messages import Capabilities, Event, Failure, Job, LoadProgress, Usage
from omni_ray.watch import look_after_neighbours

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from omni_ray.engine.lockstep import Lockstep
    from omni_ray.engine.loop import EngineLoop

logger = logging.getLogger(__name__)

Report = Callable[..., None]
Address = tuple[str, int]


class Rank:
    """Rank ``index`` of a gang. Its methods are called through Ray by the replica that owns the gang.

    The first rank decides and answers; the others follow it (``lockstep``).
    """

    def __init__(self, group: DitGroup, source: str, index: int, replica_id: str) -> None:
        look_after_neighbours()
        self._group = group
        self._source = source
        self._index = index
        self._replica_id = replica_id
        self._store: TCPStore | None = None
        self._loop: EngineLoop | None = None
        self._capabilities: Capabilities | None = None
        self._meters = RankMeters(group, replica_id, index)
        self._telling: asyncio.Task[None] | None = None
        self._has_gpu = False
        self._warnings: tuple[str, ...] = ()

    async def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def meet(self) -> Address:
        """Open the store where the ranks of the gang meet. Only called on the first."""
        from omni_ray.engine import world

        host = ray.util.get_node_ip_address()
        self._store, port = world.open_store(host)
        return host, port

    async def load(self, address: Address | None) -> AsyncIterator[LoadProgress | Capabilities]:
        """Meet the other ranks at ``address`` if there are any, load and prepare the pipeline.

        Yields progress, and last what the pipeline accepts.
        """
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
        loading = main.run_in_executor(loader, self._load, report, address)
        loader.shutdown(wait=False)
        loading.add_done_callback(lambda _: progress.put_nowait(None))
        while (step := await progress.get()) is not None:
            yield step
        self._capabilities = await loading
        if self._has_gpu:
            self._telling = asyncio.create_task(self._meters.tell_memory_forever())
        yield self._capabilities

    def _load(self, report: Report, address: Address | None) -> Capabilities:
        import torch  # here, since the process that owns the gang imports this module and needs no torch

        from omni_ray.accel.apply import accelerate
        from omni_ray.accel.capabilities import read_capabilities
        from omni_ray.accel.compile import is_compiled
        from omni_ray.accel.edits import edit_pipelines
        from omni_ray.accel.loader import load_pipeline, read_parts, resolve
        from omni_ray.accel.parallel import build_mesh
        from omni_ray.engine.exchange import Exchange
        from omni_ray.engine.lockstep import Alone
        from omni_ray.engine.loop import EngineLoop
        from omni_ray.engine.warm_up import warm_up

        group = self._group
        device = torch.device("cuda" if group.device != "cpu" and torch.cuda.is_available() else "cpu")
        self._has_gpu = device.type == "cuda"
        if self._has_gpu:
            torch.cuda.set_per_process_memory_fraction(group.memory.gpu_memory_utilization)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.parallel.ranks_per_node))
        lockstep = Alone() if address is None else self._meet_the_others(address, device)
        folder = resolve(self._source, group.allow_pickle_weights)
        dtype = group.dtype if group.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        loading = (folder, getattr(torch, dtype), device, group, functools.partial(report, "loading weights"))
        pipe = load_pipeline(*loading)
        mesh = build_mesh(group.parallel, device.type) if group.parallel.num_ranks > 1 else None
        exchange = Exchange(mesh) if mesh is not None and group.parallel.cfg > 1 else None
        accelerators = accelerate(pipe, group, device, mesh, functools.partial(read_parts, pipe, *loading))
        self._warnings = accelerators.warnings
        for warning in accelerators.warnings:
            logger.warning("%s: %s", group.id, warning)
        edits = edit_pipelines(pipe)
        capabilities = self._within_memory(read_capabilities(pipe, folder, group, edits), device)
        options: dict[str, Any] = {"edits": edits, "on_forward": self._meters.forward}
        self._loop = EngineLoop(pipe, group.batching, lockstep, exchange, accelerators, device, **options)
        self._loop.start()
        if is_compiled(group.compile, device) and lockstep.leads:
            report("compiling")
            complete = functools.partial(self._complete, capabilities=capabilities)
            warm_up(self._loop, capabilities, complete, joins=group.batching.max_num_seqs > 1)
        return capabilities

    def _meet_the_others(self, address: Address, device: torch.device) -> Lockstep:
        from omni_ray.engine import world
        from omni_ray.engine.lockstep import Lockstep

        world.join(self._index, self._group.parallel.num_ranks, *address, device, self._store)
        return Lockstep()

    def _within_memory(self, capabilities: Capabilities, device: torch.device) -> Capabilities:
        """With sizes limited to what fits beside the weights, so that a larger request is refused before it starts."""
        from omni_ray.plan.fit import room_for
        from omni_ray.plan.inventory import local_inventory

        if device.type != "cuda":
            return capabilities
        as_loaded = self._group.model_copy(update={"defaults": capabilities.defaults})
        room = room_for(as_loaded, self._source, local_inventory())
        if room is None:
            return capabilities
        if room.alone < capabilities.max_pixels:
            logger.warning(
                "%s: limits.max_pixels is %d, but no more than %d fit beside the weights; more is refused",
                self._group.id,
                capabilities.max_pixels,
                room.alone,
            )
        return dataclasses.replace(capabilities, max_pixels=min(room.alone, capabilities.max_pixels), room=room)

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
                if isinstance(event, Usage):
                    event = self._truth(event)
                yield event
                if isinstance(event, (Usage, Failure)):
                    return
        finally:
            self._engine.cancel(job.id)

    def _truth(self, usage: Usage) -> Usage:
        """The job's cost with what the group was asked for and is not doing."""
        cache, warnings = self._group.cache.kind, [*self._warnings, *usage.warnings]
        if cache != "none" and not usage.steps_skipped:
            warnings.append(f"cache {cache}: none of the {usage.steps_computed} steps could be skipped")
        return dataclasses.replace(usage, cache=cache, warnings=tuple(warnings))

    async def set_cache(self, threshold: float | None, max_consecutive_skips: int | None) -> None:
        """See :meth:`Gang.set_cache`. The first rank decides for all what is skipped."""
        self._engine.set_cache(threshold, max_consecutive_skips)

    async def cancel(self, job_id: str) -> None:
        self._engine.cancel(job_id)

    async def join(self) -> None:
        """Return when the engine loop ends: after an error, or with the process."""
        while self._loop is None or self._loop.alive():
            await asyncio.sleep(0.5)

    async def ping(self) -> None:
        """Answered as long as the process is alive and not stuck."""
