"""The engine loop: the one thread that owns the device.

Each turn it takes the calls that wait at the gate, decides (:class:`Turn`) which lanes start, which unwind and which
are computed together, and carries the decision out. A turn is plain data, made in :meth:`EngineLoop.decide` on the
first rank of a gang and followed in :meth:`EngineLoop.execute` on all of them; ``lockstep`` lies between the two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from omni_ray.config.spec import Batching
from omni_ray.engine import batch
from omni_ray.engine.clock import DeviceClock, OnForward
from omni_ray.engine.forward import Forward
from omni_ray.engine.gate import Call, Gate
from omni_ray.engine.lane import Emit, Encode, Lane
from omni_ray.engine.lockstep import Alone, Lockstep, Turn
from omni_ray.engine.snapshots import When
from omni_ray.errors import Cancelled, ConfigError
from omni_ray.messages import Failure, Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_ray.accel.apply import Accelerators
    from omni_ray.engine.exchange import Exchange

GRACE_S = 0.01
"""How long the device may idle for lanes that are between two calls, so that they share the next forward."""

SLACK_FACTOR = 3.0
"""A request should end within this many times the seconds that it would take alone (the usual SLO for diffusion)."""


SWITCH_FACTOR = 8.0
"""How many times the bringing of a component a lane has to be late, before it interrupts lanes of another one."""


class EngineLoop:
    """Runs jobs through ``pipe`` until :meth:`stop`. ``submit`` and ``cancel`` may be called from any thread.

    ``device`` is where it computes; where that is not said, it is where the pipeline's weights are. ``encode`` makes
    media of what a pipeline returns. ``edits`` are pipelines of the same modules for jobs with an ``image`` or a
    ``mask``. ``on_forward`` is told of each forward (see :mod:`omni_ray.engine.clock`).
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        batching: Batching,
        lockstep: Alone | Lockstep | None = None,
        exchange: Exchange | None = None,
        accelerators: Accelerators | None = None,
        device: torch.device | None = None,
        encode: Encode | None = None,
        edits: Mapping[str, DiffusionPipeline] = MappingProxyType({}),
        on_forward: OnForward | None = None,
    ) -> None:
        self._pipe = pipe
        self._device = device or torch.device(pipe.device)
        self._encode = encode
        self._edits = edits
        self._teacache = accelerators.teacache if accelerators else None
        cache_dit = accelerators.cache_dit if accelerators else None
        self._snapshots: When = "before computed steps" if self._teacache else "after any step"
        if cache_dit is not None:  # what it keeps goes back several steps
            self._snapshots = "never"
        self._has_cache = self._teacache is not None or cache_dit is not None
        self._num_admitted = 0
        self._offload = offload = accelerators.offload if accelerators else None
        self._batching = batching
        self._lockstep = lockstep or Alone()
        self._num_parts = exchange.size if exchange else 1
        self._gate = Gate(self._describe, defers=self._num_parts > 1)
        self._clock = DeviceClock(self._device, offload.take_transfers if offload else None, on_forward)
        self._forward = Forward(pipe, self._clock, self._lockstep, exchange, accelerators)
        self._helper_lock = threading.RLock()
        self._inbox_lock = threading.Lock()
        self._inbox: list[tuple[Job, Emit]] = []
        self._cancelled: list[str] = []
        self._emits: dict[str, Emit] = {}
        self._lanes: dict[str, Lane] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        if self._device.type == "cuda":  # its linear algebra, which schedulers use, is loaded at its first call,
            torch.linalg.inv(torch.ones(1, 1, device=self._device))  # and fails if two lanes make that at once

    # -- any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and end the thread."""
        with self._inbox_lock:
            self._stopping = True
            self._cancelled.extend([*list(self._lanes), *(job.id for job, _ in self._inbox)])
        self._gate.nudge()
        self._thread.join()

    def join(self) -> None:
        """Wait for the end: on a rank that follows, until the first one stops."""
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

    def set_cache(self, threshold: float | None, max_consecutive_skips: int | None) -> None:
        """Change TeaCache's limits; what is None stays. Raises ConfigError if there is no TeaCache."""
        if self._teacache is None:
            raise ConfigError("cache: this group has no TeaCache whose limits could change; redeploy it with one")
        self._teacache.set_limits(threshold, max_consecutive_skips)

    def alive(self) -> bool:
        return self._thread.is_alive()

    # -- the loop's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        stop = False
        while not stop:
            turn = self._lockstep.agree(self.decide)
            self.execute(turn)
            stop = turn.stop
            if not turn and self._lockstep.leads:
                self._clock.busy()
                self._gate.wait(self._has_news, timeout_s=0.05)

    def decide(self) -> Turn:
        """Make the next turn from what waits in the inbox and at the gate."""
        self._forget_ended()
        with self._inbox_lock:
            cancel, self._cancelled = tuple(self._cancelled), []
            self._drop_queued(cancel)
            num_free = 0 if self._stopping else self._batching.max_num_seqs - len(self._lanes)
            admitted, self._inbox = self._inbox[:num_free], self._inbox[num_free:]
            self._emits.update({job.id: emit for job, emit in admitted})
        run: list[list[Call]] = []
        if not admitted and not cancel:
            run = self._choose(self._gate.settle(self._is_full, self._has_news, self._clock.busy, GRACE_S))
        return Turn(
            admit=tuple(job for job, _ in admitted),
            cancel=cancel,
            run=tuple(tuple(call.id for call in share) for share in run),
            stop=self._stopping and not self._lanes,
        )

    def _choose(self, calls: list[Call]) -> list[list[Call]]:
        """The calls to compute next, in a share for each part of the cfg axis."""
        if not calls:
            return []
        if self._num_parts > 1 and self._has_cache:
            return batch.share_at_home(calls, self._slack_s, self._budget, self._num_parts)
        chosen = batch.choose(calls, self._slack_s, self._budget * self._num_parts)
        return batch.share_out(chosen, calls, self._slack_s, self._num_parts)

    def _forget_ended(self) -> None:
        self._lanes = {lane_id: lane for lane_id, lane in self._lanes.items() if self._gate.has(lane_id)}

    def _drop_queued(self, cancelled: tuple[str, ...]) -> None:
        for job, emit in self._inbox:
            if job.id in cancelled:
                emit(Failure(job_id=job.id, error=Cancelled(f"request {job.id} was cancelled before its first step")))
        self._inbox = [(job, emit) for job, emit in self._inbox if job.id not in cancelled]

    def execute(self, turn: Turn) -> None:
        """Carry out a turn: the same on every rank."""
        self._forget_ended()
        for job in turn.admit:
            emit = self._emits.pop(job.id, None)
            kind = "mask" if job.mask else "image" if job.images else "text"
            owned = (self._edits.get(kind, self._pipe), self._device, self._gate, self._helper_lock)
            lane = Lane(job, *owned, emit, self._clock.busy, self._encode, self._snapshots)
            self._lanes[job.id] = lane
            lane.number, self._num_admitted = self._num_admitted, self._num_admitted + 1
            lane.start()
        for job_id in turn.cancel:
            self._gate.cancel(job_id)
        if turn.run:
            self._gate.release(self._forward.compute([self._gate.take(share) for share in turn.run]))

    @property
    def _budget(self) -> int:
        return self._batching.max_num_batched_tokens

    def _describe(self, call: Call) -> None:
        call.tokens = batch.num_tokens(call, self._patch_size(call.name))
        call.alone = (call.name, call.method) in self._forward.alone
        call.key = (call.lane.id,) if call.alone else batch.signature(call)

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
        """Seconds that the lane can wait before it misses SLACK_FACTOR times its time alone; the least goes next.

        A component that has to be brought is worth its bringing only to a lane that is late by several times that.
        """
        lane = call.lane
        per_step_s = self._clock.seconds_per_token(call.name) * call.tokens
        left_s = per_step_s * max(lane.num_steps - lane.step, 1)
        deadline = lane.created + SLACK_FACTOR * per_step_s * max(lane.num_steps, 1)
        switch_s = SWITCH_FACTOR * self._offload.switch_s(call.name) if self._offload else 0.0
        return deadline - time.perf_counter() - left_s + switch_s
