"""The engine loop: the one thread that owns the device.

Each turn it takes the calls that wait at the gate, decides (:class:`Turn`) which lanes start, which unwind and which
are computed together, and carries the decision out. A turn is plain data, made in :meth:`EngineLoop.decide` and
followed in :meth:`EngineLoop.execute`: what lies between the two, ``announce``, is where other ranks listen.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from omni_ray.config.spec import Batching
from omni_ray.engine import batch
from omni_ray.engine.clock import DeviceClock
from omni_ray.engine.gate import Call, Gate
from omni_ray.engine.lane import Emit, Lane
from omni_ray.errors import Cancelled
from omni_ray.messages import Failure, Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

GRACE_S = 0.01
"""How long the device may idle for lanes that are between two calls, so that they share the next forward."""

SLACK_FACTOR = 3.0
"""A request should end within this many times the seconds that it would take alone (the usual SLO for diffusion)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One decision of the loop: jobs that become lanes, lanes that unwind, lanes whose calls share the next forward."""

    admit: tuple[Job, ...]
    cancel: tuple[str, ...]
    run: tuple[str, ...]


class EngineLoop:
    """Runs jobs through ``pipe`` until :meth:`stop`. ``submit`` and ``cancel`` may be called from any thread."""

    def __init__(
        self, pipe: DiffusionPipeline, batching: Batching, announce: Callable[[Turn], None] = lambda turn: None
    ) -> None:
        self._pipe = pipe
        self._batching = batching
        self._announce = announce
        self._gate = Gate(self._describe)
        self._clock = DeviceClock(torch.device(pipe.device))
        self._helper_lock = threading.RLock()
        self._inbox_lock = threading.Lock()
        self._inbox: list[tuple[Job, Emit]] = []
        self._cancelled: list[str] = []
        self._emits: dict[str, Emit] = {}
        self._lanes: dict[str, Lane] = {}
        self._alone: set[tuple[str, str]] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    # -- any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and end the thread."""
        with self._inbox_lock:
            self._stopping = True
            self._cancelled.extend(self._lanes)
        self._gate.nudge()
        self._thread.join()

    def submit(self, job: Job, emit: Emit) -> None:
        """Queue a job. ``emit`` gets its events, from several threads, the last one a Usage or a Failure."""
        with self._inbox_lock:
            self._inbox.append((job, emit))
        self._gate.nudge()

    def cancel(self, job_id: str) -> None:
        with self._inbox_lock:
            self._cancelled.append(job_id)
        self._gate.nudge()

    def alive(self) -> bool:
        return self._thread.is_alive()

    # -- the loop's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._stopping and not self._lanes):
            turn = self.decide()
            self._announce(turn)
            self.execute(turn)
            if not (turn.run or turn.admit or turn.cancel):
                self._gate.wait(self._has_news, timeout_s=0.05)

    def decide(self) -> Turn:
        """Make the next turn from what waits in the inbox and at the gate."""
        self._lanes = {lane_id: lane for lane_id, lane in self._lanes.items() if self._gate.has(lane_id)}
        with self._inbox_lock:
            cancel, self._cancelled = tuple(self._cancelled), []
            self._drop_queued(cancel)
            num_free = self._batching.max_num_seqs - len(self._lanes)
            admitted, self._inbox = self._inbox[:num_free], self._inbox[num_free:]
            self._emits.update({job.id: emit for job, emit in admitted})
        run: list[Call] = []
        if not admitted and not cancel:
            calls = self._gate.settle(self._is_full, self._has_news, self._clock.busy, GRACE_S)
            run = batch.choose(calls, self._slack_s, self._budget) if calls else []
        return Turn(admit=tuple(job for job, _ in admitted), cancel=cancel, run=tuple(call.lane.id for call in run))

    def _drop_queued(self, cancelled: tuple[str, ...]) -> None:
        for job, emit in self._inbox:
            if job.id in cancelled:
                emit(Failure(job_id=job.id, error=Cancelled(f"request {job.id} was cancelled before its first step")))
        self._inbox = [(job, emit) for job, emit in self._inbox if job.id not in cancelled]

    def execute(self, turn: Turn) -> None:
        """Carry out a turn: the same on every rank."""
        for job in turn.admit:
            lane = self._lanes[job.id] = Lane(job, self._pipe, self._gate, self._helper_lock, self._emits.pop(job.id))
            lane.start()
        for job_id in turn.cancel:
            self._gate.cancel(job_id)
        if turn.run:
            self._compute(self._gate.take(turn.run))

    @property
    def _budget(self) -> int:
        return self._batching.max_num_batched_tokens

    def _describe(self, call: Call) -> None:
        call.tokens = batch.num_tokens(call, self._patch_size(call.name))
        call.key = (call.lane.id,) if (call.name, call.method) in self._alone else batch.signature(call)

    def _patch_size(self, name: str) -> int:
        """Latent pixels along one edge of a token. Transformers that take latents as pictures patch them themselves."""
        config = getattr(getattr(self._pipe, name), "config", None)
        if "transformer" not in name or config is None:
            return 1
        patch: Any = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", 1)
        return int(patch[-1] if isinstance(patch, (tuple, list)) else patch)

    def _is_full(self, calls: list[Call]) -> bool:
        return batch.is_full(calls, self._budget)

    def _has_news(self) -> bool:
        """Something came in that the next turn should see before it computes."""
        return bool(self._cancelled) or (bool(self._inbox) and len(self._lanes) < self._batching.max_num_seqs)

    def _slack_s(self, call: Call) -> float:
        """Seconds that the lane can wait before it misses SLACK_FACTOR times its time alone; the least goes next."""
        lane = call.lane
        per_step_s = self._clock.seconds_per_token(call.name) * call.tokens
        left_s = per_step_s * max(lane.num_steps - lane.step, 1)
        deadline = lane.created + SLACK_FACTOR * per_step_s * max(lane.num_steps, 1)
        return deadline - time.perf_counter() - left_s

    def _compute(self, calls: list[Call]) -> None:
        try:
            output = self._forward(calls, *batch.join(calls))
            for call, result in zip(calls, batch.split(output, calls), strict=True):
                call.result = result
        except batch.Unsplittable as reason:
            logger.warning(
                "%s.%s is computed one request at a time: its answer has %s", calls[0].name, calls[0].method, reason
            )
            self._alone.add((calls[0].name, calls[0].method))
            self._compute_each(calls)
            return
        except torch.OutOfMemoryError as error:
            if len(calls) > 1:
                logger.warning(
                    "no memory for %d requests in one forward, so each is computed alone; "
                    "lower batching.max_num_batched_tokens",
                    len(calls),
                )
                self._compute_each(calls)
                return
            calls[0].error = error
        except Exception as error:  # the lanes whose forward it was fail; the others go on
            for call in calls:
                call.error = error
        self._gate.release(calls)

    def _compute_each(self, calls: list[Call]) -> None:
        for call in calls:
            self._compute([call])

    def _forward(self, calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = calls[0]
        module = getattr(self._pipe, first.name)
        compute = module if first.method == "forward" else getattr(module, first.method)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if first.autocast is not None:
                stack.enter_context(torch.autocast(first.autocast[0], first.autocast[1]))
            if first.branch is not None and hasattr(module, "cache_context"):
                stack.enter_context(module.cache_context(first.branch))
            stack.enter_context(self._clock.measure(calls))
            return compute(*args, **kwargs)
