"""Previews: what the latents of a running lane would look like, made by its pipeline's own last lines.

The pipeline is run once more with stand-ins for all that computes: its modules answer what they answered this lane
before, its scheduler hands on the estimate of the clean latents, and only the decoder computes, small images, each
larger than the one before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from omni_ray.engine.replay import Answers, Computes, as_result, is_denoising, next_sample, sample_of

if TYPE_CHECKING:
    from omni_ray.engine.lane import Lane

SCALES = (1 / 2, 3 / 8, 1 / 4)
"""The size that is decoded, by the number of previews still to come. Three of them cost half of an image's decoding."""

SMALLEST = 8
"""Latent pixels along an edge that are left at least when latents are made smaller."""


def preview_steps(num_previews: int, num_steps: int) -> frozenset[int]:
    """After which steps (from 1) the previews are due: evenly spread, and not after the last."""
    steps = (round(i * num_steps / (num_previews + 1)) for i in range(1, num_previews + 1))
    return frozenset(step for step in steps if 1 <= step < num_steps)


def clean_estimate(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor, result: Any) -> torch.Tensor:
    """The latents without noise, as far as a scheduler's step from ``sample`` to ``result`` can tell them.

    Flow matching: x0 = x_t - sigma v (Lipman et al., https://arxiv.org/abs/2210.02747). Schedulers of several steps
    keep estimates of their own; where there is none, the step's result has to do.
    """
    kept = getattr(scheduler, "model_outputs", None) or [None]
    told = result[1:] if isinstance(result, tuple) else [getattr(result, "pred_original_sample", None)]
    estimate = next_sample(result)
    if isinstance(kept[-1], torch.Tensor):
        estimate = kept[-1]
    elif told and isinstance(told[0], torch.Tensor):
        estimate = told[0]
    elif type(scheduler).__name__.startswith("FlowMatch"):
        sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
        estimate = (sample.float() - sigma * model_output.float()).to(sample.dtype)
    return estimate


class Tail:
    """Answers a pipeline's calls with what ``answers`` holds, until its loop is over; after that the gate computes, on
    latents whose edges are ``scale`` times as long."""

    def __init__(self, answers: Answers, gate: Computes, scale: float) -> None:
        self._before = list(answers.before)
        self._last = dict(answers.last)
        self._gate = gate
        self._scale = scale
        self._ordinal = 0
        self._is_past = False

    def compute(self, lane: Lane, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_denoising(name, method):
            place, self._ordinal = (name, self._ordinal), self._ordinal + 1
            return self._last[place] if place in self._last else next(iter(self._last.values()))
        if not self._is_past:
            return self._before.pop(0)
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._first, (args, kwargs))
        return self._gate.compute(lane, name, method, args, kwargs)

    def run(self, pipe: Any, call: Callable[[Any], Any], latents: torch.Tensor, *, skips_loop: bool) -> Any:
        """What ``pipe``, whose modules ask this, makes of ``latents`` at the end of its loop; ``call`` calls it.

        ``skips_loop``: the loop may be as short as one step, which a pipeline that starts in its middle cannot do.
        """
        scheduler = copy.copy(pipe.scheduler)
        own = {name: each for name, each in vars(scheduler).items() if name not in ("step", "set_timesteps")}
        scheduler.__dict__ = copy.deepcopy(own)
        set_timesteps, passed = scheduler.set_timesteps, 0

        @functools.wraps(set_timesteps)
        def set_last(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps[-1:]

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            passed, self._ordinal = passed + 1, 0
            self._is_past = passed >= len(scheduler.timesteps) - begins_at(scheduler)
            return as_result(latents if self._is_past else sample_of((args, kwargs)), (args, kwargs))

        scheduler.step = step
        if skips_loop:
            scheduler.set_timesteps = set_last
        pipe.__dict__["scheduler"] = scheduler
        try:
            return call(pipe)
        finally:
            vars(scheduler).clear()  # its step holds it, and the answers

    def _first(self, latents: torch.Tensor) -> torch.Tensor:
        """The first of a batch of latents ``[B, C, (F,) H, W]``, and of a video the first frame."""
        if latents.ndim not in (4, 5):
            return latents
        frame = latents[:1, :, 0] if latents.ndim == 5 else latents[:1]
        scale = max(self._scale, SMALLEST / min(frame.shape[-2:]))
        if scale < 1:
            frame = torch.nn.functional.adaptive_avg_pool2d(
                frame, (round(scale * frame.shape[-2]), round(scale * frame.shape[-1]))
            )
        return frame.unsqueeze(2) if latents.ndim == 5 else frame


def begins_at(scheduler: Any) -> int:
    """The timestep, by index, with which a pipeline's loop begins: one that draws from an image skips the first."""
    return getattr(scheduler, "begin_index", None) or 0
