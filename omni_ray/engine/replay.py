"""Going on with a request where another lane left it.

An unmodified pipeline has no door into the middle of its loop. But all that the loop carries from step to step are the
latents and the state of the scheduler, of the random generator and of a guider. So a lane that goes on after step n
runs the pipeline from the start: up to there its transformers answer again what they answered in the first step, its
scheduler hands on the latents as they are, and at step n what was saved takes their place.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from omni_ray.engine.lane import Lane

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Computes(Protocol):
    """What the modules of a lane hand their calls to: the gate, or something in front of it."""

    def compute(self, lane: Lane, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def is_denoising(name: str, method: str) -> bool:
    """Whether a call is a forward of a transformer."""
    return name.startswith("transformer") and method == "forward"


class Answers:
    """Hands a lane's calls on, and keeps the answers: all before the first step, and then each transformer's last.

    While ``repeats`` is set, a transformer that has answered before in the same place of a step answers the same again.
    """

    def __init__(self, gate: Computes, repeats: bool) -> None:
        self._gate = gate
        self.repeats = repeats
        self.before: list[Any] = []
        self.last: dict[tuple[str, int], Any] = {}
        self._ordinal = 0

    def begin_step(self) -> None:
        self._ordinal = 0

    def compute(self, lane: Lane, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_denoising(name, method):
            result = self._gate.compute(lane, name, method, args, kwargs)
            if not self.last:
                self.before.append(result)
            return result
        place, self._ordinal = (name, self._ordinal), self._ordinal + 1
        if not self.repeats or place not in self.last:
            self.last[place] = self._gate.compute(lane, name, method, args, kwargs)
        return self.last[place]


@dataclass
class Carried:
    """What a lane's loop carries from step to step beside the latents: ``guiders`` are those among the pipeline's
    components, by name."""

    scheduler: Any
    generator: torch.Generator
    guiders: dict[str, Any]

    def momenta(self) -> dict[str, Any]:
        """The buffers of the guiders that keep one, by the guider's name."""
        buffers = {name: getattr(guider, "momentum_buffer", None) for name, guider in self.guiders.items()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def save(step: int, steps_skipped: int, sample: torch.Tensor, carried: Carried) -> Callable[[], bytes]:
    """What a lane needs to go on after ``step`` steps, the last of which gave ``sample``.

    The copies from the device are only queued here, as to wait for them would leave the device without work; what is
    returned waits, in whichever thread it is called.
    """
    state: dict[str, Any] = {
        "step": step,
        "steps_skipped": steps_skipped,
        "sample": sample,
        "scheduler": {name: value for name, value in vars(carried.scheduler).items() if _is_plain(value)},
        "generator": carried.generator.get_state(),
        "momenta": {name: buffer.running_average for name, buffer in carried.momenta().items()},
    }
    state = pytree.tree_map_only(torch.Tensor, _queue_copy, state)
    copied = torch.cuda.Event() if sample.is_cuda else None
    if copied is not None:
        copied.record()

    def data() -> bytes:
        if copied is not None:
            copied.synchronize()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    return data


def _queue_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in main memory, which is there once the device gets so far."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _is_plain(value: Any) -> bool:
    """Whether it can be loaded without running any code."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (torch.Tensor, bool, int, float, str, type(None)))


class Resumption:
    """Brings a lane to where :func:`save` left another one of the same job."""

    def __init__(self, saved: bytes, device: torch.device) -> None:
        self._saved = torch.load(io.BytesIO(saved), map_location=device, weights_only=True)
        self.step: int = self._saved["step"]
        self.steps_skipped: int = self._saved.get("steps_skipped", 0)  # older releases saved none
        self._passed = 0

    def pass_step(self, carried: Carried, arguments: Arguments) -> Any:
        """The result of a step of the scheduler that is not taken. At the last one the saved state is in place."""
        self._passed += 1
        sample = sample_of(arguments)
        if self.is_over:
            for name, value in self._saved["scheduler"].items():
                setattr(carried.scheduler, name, _placed(value, getattr(carried.scheduler, name, None)))
            carried.generator.set_state(self._saved["generator"].cpu())
            for name, buffer in carried.momenta().items():
                buffer.running_average = self._saved["momenta"][name]
            sample = self._saved["sample"].to(sample.device)
        return as_result(sample, arguments)

    @property
    def is_over(self) -> bool:
        return self._passed >= self.step


def _placed(value: Any, before: Any) -> Any:
    """A saved tensor where the one before it was: schedulers keep some of theirs on the CPU."""
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        return value.to(before.device)
    return value


def sample_of(arguments: Arguments) -> torch.Tensor:
    """The latents that a scheduler's step is called with: `step(model_output, timestep, sample, ...)`."""
    args, kwargs = arguments
    sample: torch.Tensor = kwargs["sample"] if "sample" in kwargs else args[2]
    return sample


def next_sample(result: Any) -> torch.Tensor:
    """The latents that a scheduler's step gave."""
    sample: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return sample


def as_result(sample: torch.Tensor, arguments: Arguments) -> Any:
    """``sample`` as the result of a scheduler's step that was called with ``arguments``."""
    if arguments[1].get("return_dict", True):
        return SimpleNamespace(prev_sample=sample, pred_original_sample=sample, denoised=sample)
    return sample, sample
