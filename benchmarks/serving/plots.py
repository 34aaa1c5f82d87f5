"""A run as a picture: latencies as cumulative shares, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.serving.load import Run
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.slo import in_time

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {
    "done": "tab:blue",
    "in time": "tab:green",
    "late": "tab:orange",
    "refused": "tab:purple",
    "failed": "tab:red",
}
CLASS_COLOURS = ("tab:blue", "tab:brown", "tab:pink", "tab:cyan", "tab:olive", "tab:grey")
POINT_SHARE = 0.004
"""Share of the time axis below which a bar is drawn as a dot."""


def plot_run(run: Run, deadline_s: Mapping[str, float], file: Path) -> None:
    """Left the latencies of each class, right the requests by outcome, and how many were in flight."""
    figure = pyplot.figure(figsize=(12, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.4), height_ratios=(2.4, 1))
    _plot_latencies(figure.add_subplot(grid[:, 0]), run.outcomes, deadline_s)
    timeline = figure.add_subplot(grid[0, 1])
    _plot_timeline(timeline, run.outcomes, deadline_s)
    _plot_in_flight(figure.add_subplot(grid[1, 1], sharex=timeline), run.outcomes)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _plot_latencies(axis: Any, outcomes: Sequence[Outcome], deadline_s: Mapping[str, float]) -> None:
    good = [o for o in outcomes if o.failure is None]
    axis.set_prop_cycle(color=CLASS_COLOURS)
    for label in sorted({o.label for o in good}):
        some = [o for o in good if o.label == label]
        (line,) = axis.step(*_cumulative([o.total_s for o in some]), where="post", label=label)
        if label in deadline_s:
            axis.axvline(deadline_s[label], color=line.get_color(), linestyle=":", linewidth=1)
        if any(o.gaps_s for o in some):
            first = _cumulative([o.first_s for o in some if o.first_s is not None])
            axis.step(*first, where="post", linestyle="--", color=line.get_color(), label=f"{label}: first token")
    title = "latency" + (" (dotted: deadline)" if deadline_s else "")
    axis.set(title=title, xlabel="seconds from the sending", ylabel="share of requests", ylim=(0, 1.02), xscale="log")
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _cumulative(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values in order from the least on, with the share of values up to each."""
    ordered = sorted(values)
    return [ordered[0], *ordered], [0.0, *(np.arange(1, len(ordered) + 1) / len(ordered))]


def _plot_timeline(axis: Any, outcomes: Sequence[Outcome], deadline_s: Mapping[str, float]) -> None:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(_fate(outcome, deadline_s), []).append(outcome)
    short_s = POINT_SHARE * max(o.end_s for o in outcomes)
    for fate in (name for name in COLOURS if name in found):
        some = found[fate]
        index = [o.index for o in some]
        label = f"{fate} ({len(some)})"
        width = min(4.0, max(0.6, 200 / len(outcomes)))
        axis.hlines(
            index, [o.sent_s for o in some], [o.end_s for o in some], COLOURS[fate], linewidth=width, label=label
        )
        points = [o for o in some if o.total_s < short_s]
        axis.plot([o.sent_s for o in points], [o.index for o in points], ".", color=COLOURS[fate], markersize=5)
    axis.set(title="requests, from sending to end", ylabel="request")
    axis.tick_params(labelbottom=False)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower left")


def _fate(outcome: Outcome, deadline_s: Mapping[str, float]) -> str:
    if outcome.failure:
        return "refused" if outcome.refused else "failed"
    if not deadline_s:
        return "done"
    return "in time" if in_time(outcome, deadline_s) else "late"


def _plot_in_flight(axis: Any, outcomes: Sequence[Outcome]) -> None:
    changes = sorted(change for o in outcomes for change in ((o.sent_s, 1), (o.end_s, -1)))
    times, counts = zip(*changes, strict=True)
    axis.fill_between(times, np.cumsum(counts), step="post", alpha=0.4, linewidth=0)
    axis.set(xlabel="seconds", ylabel="in flight", ylim=(0, None))
