"""Plots of what was measured, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np

from omni_ray.config.calibration import Calibration
from omni_ray.tuning.calibrate import Trace
from omni_ray.tuning.tune import Row

matplotlib.use("Agg")

from matplotlib import pyplot


def plot_calibration(found: Calibration, traces: Mapping[str, Sequence[Trace]], file: Path) -> None:
    """The pairs with the curve of each transformer, and what each threshold skips and costs."""
    figure, axes = pyplot.subplots(1, len(found.curves) + 1, figsize=(5 * (len(found.curves) + 1), 4), squeeze=False)
    for axis, (name, curve) in zip(axes[0], found.curves.items(), strict=False):
        for trace in traces[name]:
            axis.plot(trace.distances, trace.changes, ".", markersize=3, alpha=0.5)
        grid = np.linspace(curve.lowest, curve.highest, 200)
        axis.plot(grid, [curve(x) for x in grid], "k-", label=f"R² {curve.r2:.3f}")
        axis.set(title=name, xlabel="distance of the signals", ylabel="change of the blocks' output")
        axis.legend()
    last = axes[0][-1]
    rows = found.expected
    last.plot([row.skipped for row in rows], [row.psnr for row in rows], "o-")
    for row in rows:
        last.annotate(f"{row.threshold:g}", (row.skipped, row.psnr), textcoords="offset points", xytext=(4, 4))
    last.set(title="thresholds", xlabel="share of steps skipped", ylabel="PSNR, dB")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def plot_tuning(rows: Sequence[Row], floor_psnr: float, file: BinaryIO) -> None:
    """Speed-up and likeness of every setting, with the floor."""
    figure, axis = pyplot.subplots(figsize=(9, 5))
    for stage in dict.fromkeys(row.stage for row in rows):
        some = [row for row in rows if row.stage == stage and row.measured]
        axis.plot([row.speed_up for row in some], [row.psnr for row in some], "o", label=stage)
        for row in some:
            axis.annotate(row.name, (row.speed_up, row.psnr), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.axhline(floor_psnr, linestyle="--", linewidth=1, color="grey")
    axis.set(xlabel="speed-up", ylabel="PSNR, dB (99: the same image)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
