"""One replica of an AR group: vLLM's engine and vLLM's own HTTP application, called in process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import from_json, to_json
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util import placement_group_table
from ray.util.placement_group import get_current_placement_group

from omni_ray.config.spec import ArGroup, OmniSpec
from omni_ray.errors import Unavailable
from omni_ray.messages import HttpHead, HttpRequest, LoadProgress
from omni_ray.orphans import leave_none
from omni_ray.plan.placement import rank_order
from omni_ray.replica import scaling
from omni_ray.replica.asgi import AsgiApp, Exchange
from omni_ray.replica.logs import handlers_kept
from omni_ray.watch import look_after_neighbours

if TYPE_CHECKING:
    from omni_ray.replica.vllm_adapter import Vllm

logger = logging.getLogger(__name__)

Phase = Literal["starting", "loading weights", "ready", "failed"]
WATCH_INTERVAL_S = 0.2
LAST_ANSWERS_S = 0.5


class ArReplica:
    """Everything that ``vllm serve`` answers (templates, tools, reasoning, structured output, embeddings, ...).

    The constructor returns at once and loads in the background; the first `check_health` waits for it, and Ray Serve
    routes nothing to a replica before its first health check.
    """

    def __init__(self, spec: OmniSpec, group: ArGroup, source: str) -> None:
        self._group = group
        self._join_s = spec.api.stream_interval_ms / 1000
        self._progress = _Progress(group.id, source)
        self._vllm: Vllm | None = None
        self._loading = asyncio.create_task(self._load(source))

    async def http(self, request: HttpRequest) -> AsyncGenerator[HttpHead | bytes, None]:
        """The answer of vLLM's application: an `HttpHead`, then pieces of the body as they are made.

        The head comes with the first piece of the body, so that what fails before the first token fails as a status.
        Closing the generator, or cancelling the task that reads it, aborts the request inside vLLM.

        :raises Unavailable: the engine is dead and nothing of the answer was sent; another replica may take it.
        """
        app = await asyncio.shield(self._loading)
        self._check_engine()
        exchange = Exchange(app, self._bounded(request))
        try:
            head = await exchange.head()
            self._check_engine()
            yield head
            async for piece in exchange.body(self._join_s):
                yield piece
        finally:
            exchange.close()

    def _bounded(self, request: HttpRequest) -> HttpRequest:
        """With the length of its answers written in, where the request leaves it open and somebody bounds it."""
        if request.bound is None:
            return request
        assert self._vllm is not None
        field, tokens = request.bound
        body = from_json(request.body) | {field: min(tokens, self._vllm.max_answer_tokens)}
        return dataclasses.replace(request, body=to_json(body, inf_nan_mode="constants"))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`omni_ray.replica.scaling.ByTokens` decides by."""
        if self._vllm is None:
            return {}
        return {scaling.WAITING_TOKENS: float(self._vllm.num_waiting_tokens), scaling.KV_USE: self._vllm.kv_use}

    async def check_health(self) -> None:
        """:raises Unavailable: the engine or one of its ranks is dead."""
        await asyncio.shield(self._loading)
        self._check_engine()

    async def _load(self, source: str) -> AsgiApp:
        try:
            self._progress.report("starting")
            self._vllm = await asyncio.to_thread(self._start_engine, source, asyncio.get_running_loop())
            app = await self._vllm.application()
        except BaseException as error:
            self._progress.report("failed", detail=f"{type(error).__name__}: {error}")
            raise
        self._progress.report("ready")
        if self._progress.in_serve:
            self._watch = asyncio.create_task(self._exit_with_engine())
        return app

    def _start_engine(self, source: str, loop: asyncio.AbstractEventLoop) -> Vllm:
        leave_none()
        look_after_neighbours()
        if self._group.parallel.num_nodes > 1:
            placement = placement_group_table(get_current_placement_group())
            rank_order(placement["bundles_to_node_id"], self._group.parallel, self._group.id)
        with handlers_kept():
            from omni_ray.replica.vllm_adapter import Vllm, serve_args

            args = serve_args(self._group, source)
            loop.call_soon_threadsafe(self._progress.report, "loading weights")
            return Vllm(args)

    def _check_engine(self) -> None:
        if self._vllm is None or self._vllm.errored:
            raise Unavailable(f"model {self._group.id!r}: the vLLM engine of this replica is dead; try again")

    async def _exit_with_engine(self) -> None:
        """Leave at once when the engine dies. A replica that answers 503 quickly would draw requests to itself, as
        the least busy one, until Ray Serve's third health check in a row has failed."""
        assert self._vllm is not None
        while not self._vllm.errored:
            await asyncio.sleep(WATCH_INTERVAL_S)
        logger.critical("the vLLM engine of a replica of %r died; the replica leaves", self._group.id)
        await asyncio.sleep(LAST_ANSWERS_S)
        os._exit(1)

    async def close(self) -> None:
        """End the engine, its ranks and the application."""
        await asyncio.gather(self._loading, return_exceptions=True)
        vllm, self._vllm = self._vllm, None
        if vllm is not None:
            await vllm.close()

    def __del__(self) -> None:
        """Ray Serve calls this when it stops a replica in good order."""
        if self._vllm is not None:
            self._vllm.shutdown()


class _Progress:
    """Tells the router how far this replica's start is. Outside Ray Serve it tells nobody."""

    def __init__(self, group: str, source: str) -> None:
        self._group = group
        folder = Path(source)
        self._total_bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0
        self._router: Any = None
        self._replica_id = ""
        try:
            context = serve.get_replica_context()
        except RayServeException:
            return
        self._replica_id = context.replica_id.unique_id
        self._router = serve.get_deployment_handle("Router", context.app_name)

    @property
    def in_serve(self) -> bool:
        return self._router is not None

    def report(self, phase: Phase, *, detail: str = "") -> None:
        if self._router is not None:
            known = self._total_bytes if phase == "ready" else 0  # vLLM does not tell how far it is
            progress = LoadProgress(
                group=self._group,
                replica_id=self._replica_id,
                phase=phase,
                done_bytes=known,
                total_bytes=known,
                detail=detail,
            )
            self._router.report.remote(progress)
