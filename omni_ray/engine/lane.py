"""A lane: one request, run by the unmodified diffusers pipeline in a thread of its own.

The lane owns a shallow copy of the pipeline, a scheduler, a random generator and the stand-ins for its modules. All
else (weights, tokenizers) is shared. It reports every denoise step, and unwinds when it is cancelled.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.guiders import BaseGuidance
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from omni_ray.accel.cache.teacache import warnings_of
from omni_ray.engine.gate import Call, Exclusive, Gate, GatedModule, LaneCancelled
from omni_ray.engine.media import decode_image, decode_mask, encode_outputs, encode_preview
from omni_ray.engine.preview import SCALES, Tail, clean_estimate, preview_steps
from omni_ray.engine.replay import Answers, Arguments, Carried, Resumption, next_sample, sample_of
from omni_ray.engine.snapshots import Snapshots, When
from omni_ray.errors import Cancelled, EngineFailed, OmniRayError
from omni_ray.messages import Event, Failure, Job, Media, Preview, StepEvent, Usage

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils._pytree import TreeSpec

Emit = Callable[[Event], None]
Encode = Callable[[Any, Job], Iterable[Media]]

logger = logging.getLogger(__name__)
_thread_pools = ThreadpoolController()


class Lane:
    """``branch`` is the guidance branch that the pipeline is in (``cond``, ``uncond``); the seconds are device time.

    ``emit`` is None on the ranks that follow: they compute all that the first one does, and tell nobody. ``settle``
    charges the lane for what was computed for it, before it says what it cost.
    """

    def __init__(
        self,
        job: Job,
        pipe: DiffusionPipeline,
        device: torch.device,
        gate: Gate,
        lock: threading.RLock,
        emit: Emit | None,
        settle: Callable[[], object] = lambda: None,
        encode: Encode | None = None,
        snapshots: When = "never",
    ) -> None:
        self.id = job.id
        self.job = job
        self.device = device
        self.branch: str | None = None
        self.num_calls = 0
        self.number = 0  # in the order of admission, which is the same on every rank
        self.step = 0
        self._num_windows, self._window_began_at = num_windows(pipe, job.params), 0
        self.steps_of_window = int(job.params.get("num_inference_steps", 1))
        self.num_steps = self._num_windows * self.steps_of_window
        self.steps_computed = 0
        self.steps_skipped = 0
        self.device_s = self.offload_hidden_s = self.offload_paid_s = 0.0
        self.peak_memory_bytes = 0
        self.created = time.perf_counter()
        self._reported_s = 0.0
        self.branches = self._branches_before = 0  # forwards of transformers in this step, and in the one before
        self.branches_skipped = 0
        self.kept: dict[tuple[str, str, int], Any] = {}  # what the caches keep of this request
        self.structures: dict[str, TreeSpec | None] = {}  # of its transformers' answers
        self.warnings: list[str] = []
        self._gate = gate
        self._generator = torch.Generator("cpu").manual_seed(job.seed or 0)
        self._resumption = Resumption(job.resume, device) if job.resume else None
        self._answers = Answers(gate, repeats=job.resume is not None) if job.resume or job.num_previews else None
        self._num_previews = 0
        shows = job.num_previews and emit is not None
        self._preview_encoder = ThreadPoolExecutor(1, thread_name_prefix="preview") if shows else None
        self._settle = settle
        self._encode = encode or encode_outputs
        self._emit = emit or _tell_nobody
        self._follows = emit is None
        self._pipe = self._own(pipe, lock)
        guiders = {name: part for name, part in vars(self._pipe).items() if isinstance(part, BaseGuidance)}
        self._carried = Carried(self._pipe.scheduler, self._generator, guiders)
        self._snapshots = Snapshots(job.id, "never" if emit is None else snapshots, self._carried, self._emit)
        self._thread = threading.Thread(target=self._run, name=f"lane-{job.id}", daemon=True)

    def start(self) -> None:
        self._gate.enter(self)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def begins_a_guided_step(self, call: Call) -> bool:
        """Whether the call is the first of several that the transformer will get in this step, by the step before."""
        return call.is_denoising and self.branches == 0 and self._branches_before > 1

    @property
    def is_at_an_end(self) -> bool:
        """Whether the step at hand is the first or the last one of the pipeline's loop."""
        return self.step - self._window_began_at in (0, self.steps_of_window - 1)

    def count_call(self, call: Call) -> None:
        self.num_calls += 1
        self.branches += call.is_denoising

    def _own(self, pipe: DiffusionPipeline, lock: threading.RLock) -> DiffusionPipeline:
        """The lane's copy of the pipeline. Written to ``__dict__``: assignment would rewrite the shared config."""
        own = copy.copy(pipe)
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                own.__dict__[name] = GatedModule(self._answers or self._gate, self, name, component)
            elif isinstance(component, (PreTrainedTokenizerBase, ProcessorMixin)):
                own.__dict__[name] = Exclusive(component, lock)
            else:
                own.__dict__[name] = copy.deepcopy(component)
        own.__dict__["scheduler"] = self._counted(own.scheduler)
        own.set_progress_bar_config(disable=True)
        return own

    def _counted(self, scheduler: Any) -> Any:
        """Make the scheduler report each step that it takes, the one thing that all pipelines do once per step, and a
        loop that begins."""
        step, set_timesteps = scheduler.step, scheduler.set_timesteps

        @functools.wraps(step)
        def counting_step(*args: Any, **kwargs: Any) -> Any:
            if self._resumption is not None:
                return self._pass_step(self._resumption, (args, kwargs))
            result, is_computed = step(*args, **kwargs), self.branches_skipped == 0
            self._stepped(len(scheduler.timesteps))
            self._show(scheduler, (args, kwargs), result)
            if self.step < self.num_steps:
                self._snapshots.stepped(self.step, self.steps_skipped, next_sample(result), is_computed=is_computed)
            return result

        @functools.wraps(set_timesteps)
        def counting_set_timesteps(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            if self.step > 0:
                self._begin_window()

        scheduler.step, scheduler.set_timesteps = counting_step, counting_set_timesteps
        return scheduler

    def _begin_window(self) -> None:
        """The pipeline begins its loop anew, for the next frames or stage. No snapshot would hold those before it."""
        self._window_began_at = self.step
        self.kept.clear()
        self._snapshots.stop()

    def _stepped(self, num_timesteps: int) -> None:
        self.step += 1
        skipped = 0 < self.branches <= self.branches_skipped
        self.steps_skipped += skipped
        self.steps_computed += not skipped
        self._branches_before, self.branches, self.branches_skipped = self.branches, 0, 0
        self.steps_of_window = getattr(self._pipe, "_num_timesteps", None) or num_timesteps
        self.num_steps = max(self.step, self._num_windows * self.steps_of_window)
        seconds, self._reported_s = self.device_s - self._reported_s, self.device_s
        event = StepEvent(
            job_id=self.id, step=self.step, num_steps=self.num_steps, seconds=seconds, computed=not skipped
        )
        self._emit(event)

    def _pass_step(self, resumption: Resumption, arguments: Arguments) -> Any:
        """Take no step, but go on from the one that was saved."""
        assert self._answers is not None
        result = resumption.pass_step(self._carried, arguments)
        self._answers.begin_step()
        self._branches_before, self.branches = self.branches, 0
        if resumption.is_over:
            self.step, self.steps_skipped = resumption.step, resumption.steps_skipped
            self.steps_computed = self.step - self.steps_skipped
            self._resumption, self._answers.repeats = None, False
            self.kept.clear()  # what it has is of the first step
        return result

    def _show(self, scheduler: Any, arguments: Arguments, result: Any) -> None:
        """A preview where one is due, on all ranks."""
        if self._answers is not None:
            self._answers.begin_step()
            steps = preview_steps(self.job.num_previews, self.num_steps)
            if self.step in steps:
                estimate = clean_estimate(scheduler, arguments[0][0], sample_of(arguments), result)
                self._preview(estimate, SCALES[min(sum(step > self.step for step in steps), len(SCALES) - 1)])

    def _preview(self, latents: torch.Tensor, scale: float) -> None:
        assert self._answers is not None
        tail, own = Tail(self._answers, self._gate, scale), copy.copy(self._pipe)
        for name, part in vars(self._pipe).items():
            if isinstance(part, GatedModule):
                own.__dict__[name] = part.asking(tail)
            elif isinstance(part, BaseGuidance):
                own.__dict__[name] = part.new()
        try:
            output = tail.run(own, self._call, latents, skips_loop=not self.job.images)
        except Exception as error:
            self._warn_of_preview(self.step, error)
            return
        if self._preview_encoder is not None:
            self._preview_encoder.submit(self._tell_preview, output, self.step)

    def _tell_preview(self, output: Any, step: int) -> None:
        """Encode a preview and emit it, while the lane goes on."""
        try:
            for media in encode_preview(output, self.job):
                self._emit(Preview(job_id=self.id, index=self._num_previews, step=step, media=media))
            self._num_previews += 1
        except Exception as error:
            self._warn_of_preview(step, error)

    def _warn_of_preview(self, step: int, error: Exception) -> None:
        logger.warning("no preview of %s", self.id, exc_info=error)
        self.warnings.append(f"no preview after step {step}: {type(error).__name__}: {error}")

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            with _one_openmp_thread():
                output = self._call(self._pipe)
            self._gate.leave(self)  # encoding needs no device: do not let the others wait for it
            if self._preview_encoder is not None:
                self._preview_encoder.shutdown()
            for media in () if self._follows else self._encode(output, self.job):
                self._emit(media)
            self._emit(self._usage(started))
        except LaneCancelled:
            self._emit(Failure(job_id=self.id, error=Cancelled(f"request {self.id} was cancelled at step {self.step}")))
        except BaseException as error:  # a tokenizer's panic is no Exception, and its request wants an answer too
            self._emit(Failure(job_id=self.id, error=self._explain(error)))
        finally:
            self._gate.leave(self)
            if self._preview_encoder is not None:
                self._preview_encoder.shutdown(wait=False, cancel_futures=True)
            # These hold the lane, which holds them: such a cycle would keep its tensors for a while.
            del self._pipe.scheduler.step, self._pipe.scheduler.set_timesteps, self._pipe
            self._answers = None
            self.kept.clear()

    def _call(self, pipe: Any) -> Any:
        """Call a pipeline; its generator is a CPU's, so that an image does not depend on the kind of device."""
        job, taken = self.job, inspect.signature(pipe.__call__).parameters
        kwargs = {name: value for name, value in job.params.items() if name in taken}  # the API has checked the others
        if job.images:
            images = [decode_image(data) for data in job.images]
            kwargs["image"] = images[0] if len(images) == 1 else images
        if job.mask:
            kwargs["mask_image"] = decode_mask(job.mask)
        kwargs |= {n: job.num_outputs for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in taken}
        generator = self._generator if pipe is self._pipe else torch.Generator("cpu").manual_seed(job.seed or 0)
        with torch.no_grad():
            return pipe(**kwargs, generator=generator)

    def _usage(self, started: float) -> Usage:
        self._settle()
        return Usage(
            job_id=self.id,
            seed=self.job.seed or 0,
            steps_computed=self.steps_computed,
            steps_skipped=self.steps_skipped,
            device_s=self.device_s,
            offload_hidden_s=self.offload_hidden_s,
            offload_paid_s=self.offload_paid_s,
            peak_memory_gib=self.peak_memory_bytes / 2**30,
            queue_s=started - self.created,
            run_s=time.perf_counter() - started,
            warnings=(*self.warnings, *warnings_of(self.kept.values())),
        )

    def _explain(self, error: BaseException) -> OmniRayError:
        if isinstance(error, OmniRayError):
            return error
        if isinstance(error, torch.OutOfMemoryError):
            return EngineFailed(f"out of device memory at step {self.step}: ask for a smaller size or fewer images")
        return EngineFailed(f"{type(self._pipe).__name__} failed at step {self.step}: {type(error).__name__}: {error}")


def num_windows(pipe: DiffusionPipeline, params: Mapping[str, Any]) -> int:
    """How often a pipeline runs its loop for a request: Helios makes so many frames at a time, each in one or several
    stages."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "num_latent_frames_per_chunk" not in parameters:
        return 1
    latents, frames = (
        params.get(name, parameters[name].default) for name in ("num_latent_frames_per_chunk", "num_frames")
    )
    stages = "pyramid_num_inference_steps_list"
    num_stages = len(parameters[stages].default) if stages in parameters else 1
    window = (int(latents) - 1) * int(pipe.vae_scale_factor_temporal) + 1
    return num_stages * max(1, math.ceil(int(frames) / window))


def _tell_nobody(event: Event) -> None:
    """Where a following rank's events go."""


def _one_openmp_thread() -> AbstractContextManager[Any]:
    """What a lane computes between its calls is small, and the idle threads of its OpenMP pool would spin on the cores
    that the loop's forward needs."""
    torch.get_num_threads()  # torch sets a thread's pool at its first use; ours has to come after
    limits: AbstractContextManager[Any] = _thread_pools.limit(limits=1, user_api="openmp")
    return limits
