"""TeaCache: a step whose input to the blocks hardly differs from the last one's is not computed.

Source: https://arxiv.org/abs/2411.19108. The signal is the first block's modulated input. Its relative L1 distance from
the step before, rescaled by a polynomial of the model's own, estimates how much the blocks' output will change; the
estimates add up until they pass the threshold, and only then the blocks are computed again. So a higher threshold
means more reuse, more speed and less likeness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from omni_ray.accel.cache.stacks import Stacks
from omni_ray.accel.cache.standins import Streams, fitted
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.config.calibration import Curve, read_calibration
from omni_ray.config.catalog import FAMILIES
from omni_ray.config.spec import Cache
from omni_ray.errors import ConfigError

Run = Callable[[], Any]
"""Starts a forward of the transformer on the rows in question."""


@dataclass
class Kept:
    """What one request keeps of one transformer in one guidance branch: rows of the step before."""

    signal: torch.Tensor | None = None
    residuals: list[Streams] = field(default_factory=list)
    accumulated: float = 0.0
    num_skipped: int = 0
    """Steps in a row."""
    ended_by: set[str] = field(default_factory=set)
    """What has had a step computed after skipped ones: the ``threshold``, the ``limit`` on skips in a row."""


class TeaCache:
    """The caches of a pipeline's transformers. What requests keep lies with them (:class:`Kept`), not here.

    ``stacks`` and ``curves`` are those of each transformer; ``shards`` are the ranks of the sequence axes, which hold
    parts of the signal.
    """

    def __init__(
        self,
        stacks: Mapping[str, Stacks],
        curves: Mapping[str, Curve],
        threshold: float,
        max_consecutive_skips: int,
        shards: Sequence[Ranks] = (),
    ) -> None:
        self._stacks = stacks
        self._curves = curves
        self._threshold = threshold
        self._max_consecutive_skips = max_consecutive_skips
        self._shards = shards

    def set_limits(self, threshold: float | None, max_consecutive_skips: int | None) -> None:
        """From the next step on; what is None stays."""
        if threshold is not None:
            self._threshold = threshold
        if max_consecutive_skips is not None:
            self._max_consecutive_skips = max_consecutive_skips

    def can_skip(
        self, name: str, kept: Sequence[Kept], sizes: Sequence[int], ends: Sequence[bool], run: Run
    ) -> list[bool]:
        """For each request in the batch, whether this step can do without the blocks; notes the step's signal.

        Args:
            name: the transformer's component name.
            sizes: rows of each request in the batch that ``run`` puts through the transformer.
            ends: whether it is a request's first or last step, which are always computed.
        """
        signals = _rows(self._stacks[name].signal(run), sizes)
        distances = self._distances([each.signal for each in kept], signals)
        skips = []
        for each, signal, distance, end in zip(kept, signals, distances, ends, strict=True):
            each.signal = signal
            skips.append(self._decide(self._curves[name], each, distance, end))
        return skips

    def _distances(self, before: Sequence[torch.Tensor | None], now: Sequence[torch.Tensor]) -> list[float | None]:
        """Relative L1 distance of each pair, None where there is no step before. Reads the device once."""
        pairs = {i: _sums(old, new) for i, (old, new) in enumerate(zip(before, now, strict=True)) if old is not None}
        if not pairs:
            return [None] * len(now)
        sums = torch.stack(list(pairs.values()))
        for ranks in self._shards:
            sums = ranks.sum(sums)
        values: list[float] = (sums[:, 0] / sums[:, 1].clamp_min(1e-12)).tolist()
        by_index = dict(zip(pairs, values, strict=True))
        return [by_index.get(i) for i in range(len(now))]

    def _decide(self, curve: Curve, kept: Kept, distance: float | None, end: bool) -> bool:
        if end or distance is None or not kept.residuals:
            return _computed(kept)
        if kept.num_skipped >= self._max_consecutive_skips:
            return _computed(kept, "limit")
        kept.accumulated += curve(distance)
        if kept.accumulated >= self._threshold:
            return _computed(kept, "threshold")
        kept.num_skipped += 1
        return True

    def compute(self, name: str, kept: Sequence[Kept], sizes: Sequence[int], run: Run) -> Any:
        """The answer of a whole forward; each request keeps what the blocks added."""
        answer, residuals = self._stacks[name].record(run)
        for each in kept:
            each.residuals = []
        for streams in residuals:
            rows = [[None] * len(sizes) if x is None else _rows(x, sizes) for x in streams]
            for each, *own in zip(kept, *rows, strict=True):
                each.residuals.append(tuple(own))
        return answer

    def reuse(self, name: str, kept: Sequence[Kept], run: Run) -> Any:
        """The answer of a forward in which each request's kept residuals stand for the blocks."""
        return self._stacks[name].reuse(run, list(zip(*(each.residuals for each in kept), strict=True)))


def _rows(x: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Each request's rows, in memory of their own, so that none keeps those of the others."""
    return [x] if len(sizes) == 1 else [row.clone() for row in x.split(list(sizes))]


def curves_of(spec: Cache, pipe: DiffusionPipeline) -> tuple[dict[str, Curve], float, int]:
    """The curve of each transformer, the threshold, and the steps in a row that may be skipped.

    Raises ConfigError where the calibration is another model's, or its quality was measured with more or fewer skips.
    """
    transformers = transformers_of(pipe)
    if spec.calibration is None:
        chosen = {
            name: spec.coefficients or FAMILIES[type(transformer).__name__].teacache_coefficients
            for name, transformer in transformers.items()
        }
        curves = {name: Curve(coefficients=tuple(each)) for name, each in chosen.items()}
        return curves, spec.threshold, spec.max_consecutive_skips
    calibration = read_calibration(spec.calibration)
    if calibration.pipeline != type(pipe).__name__ or calibration.curves.keys() != transformers.keys():
        raise ConfigError(
            f"cache.calibration: {spec.calibration} is of a {calibration.pipeline} with "
            f"{', '.join(calibration.curves)}, but this is a {type(pipe).__name__} with {', '.join(transformers)}; "
            "calibrate this one"
        )
    skips = calibration.max_consecutive_skips
    if "max_consecutive_skips" in spec.model_fields_set and spec.max_consecutive_skips != skips:
        if spec.quality is not None:
            raise ConfigError(
                f"cache.max_consecutive_skips: {spec.max_consecutive_skips}, but the calibration measured the quality "
                f"with {skips}; leave it out"
            )
        skips = spec.max_consecutive_skips
    threshold = spec.threshold if spec.quality is None else calibration.threshold_for(spec.quality.psnr)
    return calibration.curves, threshold, skips


def _computed(kept: Kept, why: str = "") -> bool:
    if why:
        kept.ended_by.add(why)
    kept.accumulated, kept.num_skipped = 0.0, 0
    return False


def warnings_of(kept: Iterable[Any]) -> list[str]:
    """What a request should be told of what it kept: a threshold that is never reached decides nothing."""
    ended_by = {reason for each in kept if isinstance(each, Kept) for reason in each.ended_by}
    if ended_by != {"limit"}:
        return []
    return ["cache teacache: the threshold was never reached, only max_consecutive_skips was; lower it, or skip more"]


def _sums(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The sums whose quotient is the distance. The padding at the end, which is zero here, adds nothing to them."""
    old = fitted(old, new.shape[1]).float()
    return torch.stack([(new.float() - old).abs().sum(), old.abs().sum()])
