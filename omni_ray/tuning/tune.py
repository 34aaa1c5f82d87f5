"""Walks the levers one after the other on one model, and puts together the fastest profile that keeps a likeness.

The order is the one that people follow by hand: baseline, compilation, parallel axes, caches, quantization, offload,
what is good of them together, and the baseline again, which says how far the machine itself has moved meanwhile. What
each takes of the device's memory is told with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError, EngineFailed, OmniRayError
from omni_ray.messages import Job
from omni_ray.tuning.calibrate import calibrate
from omni_ray.tuning.likeness import mean_psnr, ssim
from omni_ray.tuning.measure import Levers, measure
from omni_ray.tuning.measured import Measured

Tell = Callable[[str], None]

BASELINE: Levers = {"compile": {"mode": "none"}, "attention": {"backend": "native"}}
MIN_GAIN = 1.03
"""A lever that gains less than this is noise, and is left out of the profile."""

CACHE_DIT = (
    {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.08},
    {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.2, "max_continuous_cached_steps": 3},
    {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.2, "max_continuous_cached_steps": 3, "taylorseer_order": 1},
)


@dataclass(frozen=True)
class Row:
    """One measured setting. ``psnr`` and ``ssim`` are against the first baseline; ``refused`` says why."""

    stage: str
    name: str
    levers: Levers
    measured: Measured | None = None
    speed_up: float = 0.0
    psnr: float = 0.0
    ssim: float = 0.0
    refused: str = ""


@dataclass
class Tuning:
    """What was measured, and the levers of the best profile."""

    group: DitGroup
    floor_psnr: float
    prompts: list[str]
    rows: list[Row] = field(default_factory=list)
    best: Row | None = None


def tune(group: DitGroup, jobs: Sequence[Job], floor_psnr: float, folder: Path, tell: Tell) -> Tuning:
    """Measure every lever alone, then those that pay together. Writes the calibration to ``folder``."""
    tuning = Tuning(group, floor_psnr, [str(job.params["prompt"]) for job in jobs])
    walk = _Walk(tuning, jobs, tell)
    try:
        measure(group, BASELINE, jobs)  # the first run of a process is slower than all others
    except (torch.OutOfMemoryError, EngineFailed) as error:
        raise ConfigError(f"tune: the baseline, with all weights on the device, does not run: {error}") from error
    walk.add("baseline", "none", {})
    for name, levers in _kernels():
        walk.add("compilation", name, levers)
    for axes in _axes(torch.cuda.device_count()):
        name = " x ".join(f"{axis} {degree}" for axis, degree in axes.items())
        walk.add("parallelism", name, {"parallel": axes})
    for name, levers in _caches(group, jobs, floor_psnr, folder, tell):
        walk.add("caches", name, levers)
    for kind in ("int8", "int4", "fp8") if torch.cuda.is_available() else ("int8",):
        walk.add("quantization", kind, {"quantization": {"kind": kind}})
    for kind in ("model", "layerwise", "sequential"):
        walk.add("offload", kind, {"offload": {"kind": kind}})
    walk.combine()
    walk.add("baseline", "none, again", {})
    return tuning


class _Walk:
    def __init__(self, tuning: Tuning, jobs: Sequence[Job], tell: Tell) -> None:
        self._tuning = tuning
        self._jobs = jobs
        self._tell = tell

    def add(self, stage: str, name: str, levers: Levers) -> Row:
        """Measure one setting; what the model or the machine cannot do is a row too."""
        measured = self._measure(levers)
        if isinstance(measured, str):
            row = Row(stage, name, levers, refused=measured)
            self._tell(f"{stage:>13}  {name:<34} refused: {measured}")
        else:
            exact = self._tuning.rows[0].measured if self._tuning.rows else measured
            assert exact is not None
            likeness = mean_psnr(exact.images, measured.images), ssim(exact.images, measured.images)
            row = Row(stage, name, levers, measured, exact.seconds / measured.seconds, *likeness)
            self._tell(
                f"{stage:>13}  {name:<34} {measured.seconds / len(self._jobs):7.2f} s an image, x{row.speed_up:.2f}, "
                f"{row.psnr:5.1f} dB, {measured.skipped:4.0%} of the steps skipped"
                + (f", {measured.peak_memory_gib:.1f} GiB" if measured.peak_memory_gib else "")
            )
        self._tuning.rows.append(row)
        return row

    def _measure(self, levers: Levers) -> Measured | str:
        """What was measured, or why it could not be; out of memory does not end the walk either."""
        try:
            return measure(self._tuning.group, BASELINE | levers, self._jobs)
        except ValidationError as error:
            return str(error.errors()[0]["msg"])
        except (OmniRayError, RuntimeError, AssertionError) as error:
            return (str(getattr(error, "message", error)).strip() or type(error).__name__).splitlines()[0]

    def combine(self) -> None:
        """The best of each stage together; while that is too unlike, without the stage that costs the most likeness."""
        axes = self._best_of("parallelism")
        fused = not (axes and "tensor" in axes.levers["parallel"])  # which fused projections cannot go with
        found = [self._best_of("compilation", fused=fused), axes, *map(self._best_of, ("caches", "quantization"))]
        chosen = [row for row in found if row]
        while len(chosen) > 1:
            levers: Levers = {}
            for row in chosen:
                levers |= row.levers
            together = self.add("together", " + ".join(row.name for row in chosen), levers)
            if together.measured and together.psnr >= self._tuning.floor_psnr:
                break
            chosen.remove(min(chosen, key=lambda row: row.psnr))
        good = [row for row in self._tuning.rows if row.measured and row.psnr >= self._tuning.floor_psnr]
        self._tuning.best = max(good, key=lambda row: row.speed_up)

    def _best_of(self, stage: str, *, fused: bool = True) -> Row | None:
        """``fused``: the projections may be."""
        floor = self._tuning.floor_psnr
        rows = [row for row in self._tuning.rows if row.stage == stage and row.measured and row.psnr >= floor]
        rows = [row for row in rows if fused or "fused_qkv" not in row.levers.get("attention", {})]
        best = max(rows, key=lambda row: row.speed_up, default=None)
        return best if best and best.speed_up >= MIN_GAIN else None


def _kernels() -> Iterator[tuple[str, Levers]]:
    """On a CPU the compiler takes minutes, and there is one kernel."""
    if torch.cuda.is_available():
        yield "attention auto", {"attention": {"backend": "auto"}}
        compiled = {"compile": {"mode": "regional"}}
        yield "regional compilation", compiled | {"attention": {"backend": "auto"}}
        yield "regional compilation, fused QKV", compiled | {"attention": {"backend": "auto", "fused_qkv": True}}
        yield "regional compilation, fp8 attention", compiled | {"attention": {"backend": "fa3_fp8"}}


def _axes(num_gpus: int) -> Iterator[dict[str, int]]:
    """Ways to spread a replica over the largest power of two of GPUs; what a model cannot do is refused by itself."""
    most = 1 << (num_gpus.bit_length() - 1) if num_gpus > 1 else 1
    if most > 1:
        yield {"ulysses": most}
        yield {"tensor": most}
        yield {"cfg": 2, "ulysses": most // 2} if most > 2 else {"cfg": 2}
    if most > 2:
        yield {"tensor": 2, "ulysses": most // 2}


def _caches(
    group: DitGroup, jobs: Sequence[Job], floor_psnr: float, folder: Path, tell: Tell
) -> Iterator[tuple[str, Levers]]:
    """TeaCache with the threshold that a calibration gives for the floor, and with one above; Cache-DiT."""
    file = folder / "calibration.json"
    try:
        found, _ = calibrate(group, jobs, tell)
    except ConfigError as error:
        tell(f"{'caches':>13}  TeaCache is left out: {error.message}")
    else:
        file.write_text(found.model_dump_json(indent=1) + "\n")
        kept = [each.threshold for each in found.expected if each.psnr >= floor_psnr]
        for threshold in dict.fromkeys([*kept[-2:], *[each.threshold for each in found.expected][-1:]]):
            cache = {"kind": "teacache", "threshold": threshold, "calibration": str(file)}
            yield f"TeaCache {threshold:g}", {"cache": cache}
    for options in CACHE_DIT:
        words = f"Cache-DiT {options['residual_diff_threshold']:g}"
        words += ", TaylorSeer" if "taylorseer_order" in options else ""
        yield words, {"cache": {"kind": "cache_dit", "cache_dit": options}}
