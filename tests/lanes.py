"""Jobs through an engine loop in this process."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_ray.engine import lane, snapshots
from omni_ray.engine.loop import EngineLoop
from omni_ray.messages import Event, Failure, Job, Usage
from tests.ranks import pixels


def run_lanes(
    loop: EngineLoop, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, list[Event]]]:
    """The pixels and events of the jobs, run side by side by ``loop``, which is started and stopped here."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(lane, "encode_outputs", lambda output, job: iter(made.update({job.id: pixels(output)}) or ()))
    events: dict[str, list[Event]] = {job.id: [] for job in jobs}
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def collect(job: Job) -> Any:
        def emit(event: Event) -> None:
            events[job.id].append(event)
            if isinstance(event, (Usage, Failure)):
                ended.put(event)

        return emit

    loop.start()
    for job in jobs:
        loop.submit(job, collect(job))
    for _ in jobs:
        last = ended.get(timeout=240)
        assert isinstance(last, Usage), last
    loop.stop()
    return made, events


def save_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots whenever one can be, told before the next step begins."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_S", 0.0)
    at_once = SimpleNamespace(submit=lambda save, *args: save(*args))
    monkeypatch.setattr(snapshots, "_savers", at_once)


def usage(events: list[Event]) -> Usage:
    last = events[-1]
    assert isinstance(last, Usage)
    return last


def assert_skips_as_alone(serve: Callable[[list[Job]], Any], jobs: list[Job]) -> None:
    """``serve`` gives images and events: side by side each job has the image and the skipped steps that it has alone,
    and some step is skipped."""
    together, events = serve(jobs)
    skipped = 0
    for job in jobs:
        alone, own = serve([job])
        assert np.abs(together[job.id] - alone[job.id]).max() < 1e-4
        assert usage(own[job.id]).steps_skipped == usage(events[job.id]).steps_skipped
        skipped += usage(own[job.id]).steps_skipped
    assert skipped > 0
