"""Fits TeaCache's curve to a model: how much the blocks' output changes, by how far the steps' signals are apart.

Source of the method: https://arxiv.org/abs/2411.19108. A run without a cache gives the pairs; runs with it say what
each threshold then skips and costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from omni_ray.accel.apply import Accelerators
from omni_ray.accel.cache.stacks import Stacks
from omni_ray.accel.cache.standins import Streams, fitted
from omni_ray.accel.cache.teacache import Kept, TeaCache
from omni_ray.accel.modules import transformers_of
from omni_ray.config.calibration import Calibration, Curve, Expected
from omni_ray.config.catalog import FAMILIES
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.messages import Job
from omni_ray.tuning.likeness import mean_psnr
from omni_ray.tuning.run import in_a_thread, load, run

DEGREES = (4, 3, 2, 1)
GRID = tuple(round(0.01 * 1.35**i, 4) for i in range(20))
"""Thresholds to choose from: 0.01 to 3."""
MOST_THRESHOLDS = 8
Tell = Callable[[str], None]


@dataclass
class Trace:
    """One guidance branch of one request: of each step after the first, the signal's distance and the change of what
    the blocks added."""

    distances: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)


class Recording(TeaCache):
    """Skips nothing, and writes down what it sees."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.traces: dict[str, list[Trace]] = {}
        self._of: dict[int, tuple[Kept, Trace]] = {}
        self._ended: list[Kept] = []

    def _decide(self, curve: Curve, kept: Kept, distance: float | None, end: bool) -> bool:
        if id(kept) in self._of and distance is not None:
            self._of[id(kept)][1].distances.append(distance)
            self._ended = [*self._ended, kept] if end else self._ended
        return False

    def compute(self, name: str, kept: Sequence[Kept], sizes: Sequence[int], run: Callable[[], Any]) -> Any:
        before = [each.residuals for each in kept]
        answer = super().compute(name, kept, sizes, run)
        for each, old in zip(kept, before, strict=True):
            if id(each) not in self._of:
                self._of[id(each)] = each, Trace()
                self.traces.setdefault(name, []).append(self._of[id(each)][1])
            elif old:
                self._of[id(each)][1].changes.append(_change(old, each.residuals))
        for each in self._ended:  # their tensors are needed no more
            each.signal, each.residuals = None, []
        self._ended = []
        return answer


def _change(old: Sequence[Streams], new: Sequence[Streams]) -> float:
    """Relative L1 change of what the stacks add to the image's stream, the last of each."""
    pairs = [(a[-1], b[-1]) for a, b in zip(old, new, strict=True) if a[-1] is not None and b[-1] is not None]
    moved = sum((b.float() - fitted(a, b.shape[1]).float()).abs().sum() for a, b in pairs)
    whole = sum(a.float().abs().sum() for a, _ in pairs)
    return float(torch.as_tensor(moved) / torch.as_tensor(whole).clamp_min(1e-12))


def calibrate(
    group: DitGroup, jobs: Sequence[Job], tell: Tell, thresholds: Sequence[float] = ()
) -> tuple[Calibration, dict[str, list[Trace]]]:
    """The curves of the group's model on ``jobs``, what to expect of ``thresholds`` (of a choice of our own where there
    are none), and the traces that they are fitted to.

    Raises ConfigError where TeaCache does not know the model's family.
    """
    pipe = in_a_thread(load, group)
    transformers = transformers_of(pipe)
    families = {name: FAMILIES.get(type(each).__name__) for name, each in transformers.items()}
    if unknown := [name for name, family in families.items() if family is None or not family.stacks]:
        raise ConfigError(f"calibrate: TeaCache does not know the family of {', '.join(unknown)}")
    stacks = {name: Stacks(transformers[name], family.stacks) for name, family in families.items() if family}
    as_they_are = dict.fromkeys(stacks, Curve(coefficients=(1.0, 0.0)))
    recording = Recording(stacks, as_they_are, threshold=0.0, max_consecutive_skips=0)
    seconds, exact, _ = run(pipe, jobs, group.batching, accelerators=Accelerators(recording))
    steps = jobs[0].params["num_inference_steps"]
    if short := [name for name, each in recording.traces.items() if not any(trace.changes for trace in each)]:
        raise ConfigError(f"calibrate: {steps} steps give {', '.join(short)} no two to compare; take more")
    tell(f"{len(jobs)} prompts of {steps} steps recorded in {seconds:.0f} s")
    curves = {name: fit(traces) for name, traces in recording.traces.items()}
    for name, curve in curves.items():
        tell(
            f"{name}: R² {curve.r2:.3f} of {curve.num_pairs} pairs, degree {len(curve.coefficients) - 1}, "
            f"for distances from {curve.lowest:.4f} to {curve.highest:.4f}"
        )
    found = Calibration(
        source=group.source,
        pipeline=type(pipe).__name__,
        num_inference_steps=steps,
        max_consecutive_skips=group.cache.max_consecutive_skips,
        num_prompts=len(jobs),
        curves=curves,
    )
    expected = []
    for threshold in thresholds or choose(recording.traces, found):
        images, skipped = _with(threshold, found, stacks, pipe, group, jobs)
        row = Expected(
            threshold=threshold,
            predicted=predict(recording.traces, found, threshold),
            skipped=skipped,
            psnr=mean_psnr(exact, images),
        )
        tell(
            f"threshold {threshold:<7g} {row.predicted:>4.0%} of the steps predicted, {row.skipped:>4.0%} skipped, "
            f"{row.psnr:.1f} dB"
        )
        expected.append(row)
    return found.model_copy(update={"expected": tuple(expected)}), recording.traces


def _with(
    threshold: float,
    found: Calibration,
    stacks: Mapping[str, Stacks],
    pipe: Any,
    group: DitGroup,
    jobs: Sequence[Job],
) -> tuple[list[Any], float]:
    """The images of the jobs with that threshold, and the share of steps skipped."""
    cache = TeaCache(stacks, found.curves, threshold, found.max_consecutive_skips)
    _, images, usages = run(pipe, jobs, group.batching, accelerators=Accelerators(cache))
    skipped = sum(usage.steps_skipped for usage in usages)
    return images, skipped / sum(usage.steps_skipped + usage.steps_computed for usage in usages)


def fit(traces: Sequence[Trace]) -> Curve:
    """The polynomial of least squares of the highest degree that nowhere falls between the distances that were seen."""
    x = np.concatenate([trace.distances for trace in traces])
    y = np.concatenate([trace.changes for trace in traces])
    grid = np.linspace(x.min(), x.max(), 200)
    coefficients = np.array([0.0, float(y.mean())])
    for degree in DEGREES:
        tried = np.polyfit(x, y, degree)
        if (np.diff(np.polyval(tried, grid)) >= 0).all():
            coefficients = tried
            break
    rest = ((y - np.polyval(coefficients, x)) ** 2).sum()
    r2 = 1 - rest / max(float(((y - y.mean()) ** 2).sum()), 1e-12)
    return Curve(
        coefficients=tuple(map(float, coefficients)),
        lowest=float(x.min()),
        highest=float(x.max()),
        r2=float(r2),
        num_pairs=len(x),
    )


def predict(traces: Mapping[str, Sequence[Trace]], found: Calibration, threshold: float) -> float:
    """The share of steps that the threshold would skip, if a skip changed nothing of what comes after."""
    skipped = total = 0
    for name, each in traces.items():
        for trace in each:
            accumulated, in_a_row = 0.0, 0
            total += len(trace.distances) + 1
            for distance in trace.distances[:-1]:  # the last step is always computed
                accumulated += found.curves[name](distance)
                if accumulated < threshold and in_a_row < found.max_consecutive_skips:
                    in_a_row, skipped = in_a_row + 1, skipped + 1
                else:
                    accumulated, in_a_row = 0.0, 0
    return skipped / max(total, 1)


def choose(traces: Mapping[str, Sequence[Trace]], found: Calibration) -> list[float]:
    """Thresholds that skip clearly different shares of the steps."""
    chosen, last = [], 0.0
    for threshold in GRID:
        share = predict(traces, found, threshold)
        if share >= last + 0.07:
            chosen.append(threshold)
            last = share
    return chosen[:MOST_THRESHOLDS]
