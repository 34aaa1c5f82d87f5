"""A request that goes on in another lane, and previews, for each family, from tiny checkpoints."""

from __future__ import annotations

import dataclasses
import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_ray.config.spec import Batching
from omni_ray.engine import lane
from omni_ray.engine.loop import EngineLoop
from omni_ray.engine.preview import preview_steps
from omni_ray.messages import Event, Job, Preview, Snapshot, StepEvent
from tests.lanes import run_lanes, save_at_once, usage
from tests.ranks import jobs_of
from tests.tiny_dit import FAMILIES

TEXT_TO_MEDIA = sorted(set(FAMILIES) - {"wan_i2v"})
NUM_STEPS = 6


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    save_at_once(monkeypatch)


def job_of(family: str, **more: Any) -> Job:
    job = jobs_of(family)[0]
    return dataclasses.replace(job, params=job.params | {"num_inference_steps": NUM_STEPS}, **more)


def run(pipe: Any, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, list[Event]]]:
    return run_lanes(EngineLoop(pipe, Batching(max_num_batched_tokens=1)), jobs, monkeypatch)


def steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("family", TEXT_TO_MEDIA)
@pytest.mark.usefixtures("each_step")
def test_goes_on_where_another_lane_was(family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(family)
    wanted, events = run(tiny(family), [job], monkeypatch)
    saved = [event for event in events[job.id] if isinstance(event, Snapshot)]
    assert [each.step for each in saved] == list(range(1, NUM_STEPS))
    for snapshot in (saved[0], saved[3]):
        made, after = run(tiny(family), [dataclasses.replace(job, resume=snapshot.data)], monkeypatch)
        assert (made[job.id] == wanted[job.id]).all()
        assert steps(after[job.id]) == list(range(snapshot.step + 1, NUM_STEPS + 1))
        assert usage(after[job.id]).steps_computed == NUM_STEPS


@pytest.mark.usefixtures("each_step")
def test_a_video_of_several_windows_goes_on_from_its_first_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("helios")
    job = dataclasses.replace(job, params=job.params | {"num_frames": 10})
    wanted, events = run(tiny("helios"), [job], monkeypatch)
    assert steps(events[job.id]) == list(range(1, 2 * NUM_STEPS + 1))
    saved = [event for event in events[job.id] if isinstance(event, Snapshot)]
    assert [each.step for each in saved] == list(range(1, NUM_STEPS + 1))
    for snapshot in (saved[1], saved[-1]):
        made, _ = run(tiny("helios"), [dataclasses.replace(job, resume=snapshot.data)], monkeypatch)
        assert (made[job.id] == wanted[job.id]).all()


@pytest.mark.usefixtures("each_step")
def test_goes_on_beside_others(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = job_of("wan", id="first"), job_of("wan", id="second", seed=7)
    wanted, events = run(tiny("wan"), [first, second], monkeypatch)
    saved = {job_id: [e for e in of if isinstance(e, Snapshot)][2].data for job_id, of in events.items()}
    resumed = [dataclasses.replace(job, resume=saved[job.id]) for job in (first, second)]
    made, _ = run(tiny("wan"), [*resumed, job_of("wan", id="third", seed=9)], monkeypatch)
    assert all((made[job.id] == wanted[job.id]).all() for job in resumed)


@pytest.mark.parametrize("family", TEXT_TO_MEDIA)
def test_previews_leave_the_image_as_it_is(family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = run(tiny(family), [job_of(family)], monkeypatch)
    job = job_of(family, num_previews=3)
    made, events = run(tiny(family), [job], monkeypatch)
    assert (made[job.id] == wanted[job.id]).all()
    assert usage(events[job.id]).warnings == ()
    previews = [event for event in events[job.id] if isinstance(event, Preview)]
    assert [(each.index, each.step) for each in previews] == [(0, 2), (1, 3), (2, 4)]
    images = [np.asarray(Image.open(io.BytesIO(each.media.data))) for each in previews]
    assert all(image.shape == (64, 64, 3) for image in images)
    assert all((one != other).any() for one, other in itertools.pairwise(images))


def test_a_preview_that_fails_costs_the_request_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "encode_preview", lambda output, job: 1 / 0)
    job = job_of("flux", num_previews=1)
    made, events = run(tiny("flux"), [job], monkeypatch)
    assert job.id in made
    assert "ZeroDivisionError" in usage(events[job.id]).warnings[0]


def test_previews_are_spread_over_the_steps() -> None:
    assert preview_steps(3, 20) == {5, 10, 15}
    assert preview_steps(3, 4) == {1, 2, 3}
    assert preview_steps(3, 1) == preview_steps(0, 20) == frozenset()
