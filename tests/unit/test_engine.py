"""The lane engine against the plain pipeline, for each family, from tiny checkpoints.

With batch size 1 forced the images are equal bit for bit; joined, they differ by less than BATCH_TOLERANCE.
"""

from __future__ import annotations

import gc
import io
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from omni_ray.config.spec import Batching
from omni_ray.engine import lane
from omni_ray.engine.lockstep import Alone, Turn
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import Cancelled
from omni_ray.messages import Event, Failure, Job, Media, StepEvent, Usage
from tests.tiny_dit import FAMILIES, build

BATCH_TOLERANCE = 2
"""Largest difference of an 8-bit colour value between an image made alone and one made in a joined forward (fp32)."""

ONE_BY_ONE = Batching(max_num_batched_tokens=1)
VIDEO = {"wan", "wan_i2v", "helios"}


class Counted(Alone):
    """Notes how many calls each forward joined."""

    def __init__(self) -> None:
        self.forwards: list[int] = []

    def agree(self, decide: Callable[[], Turn]) -> Turn:
        turn = decide()
        if turn.run:
            self.forwards += [len(share) for share in turn.run]
        return turn


class Engine:
    """A running loop whose events are collected per job."""

    def __init__(self, pipe: DiffusionPipeline, batching: Batching) -> None:
        lockstep = Counted()
        self.forwards = lockstep.forwards
        self.told: list[tuple[str, int, float, int]] = []
        self.loop = EngineLoop(pipe, batching, lockstep, on_forward=lambda *forward: self.told.append(forward))
        self.events: dict[str, queue.SimpleQueue[Event]] = {}
        self.loop.start()

    def submit(self, job: Job) -> None:
        self.events[job.id] = queue.SimpleQueue()
        self.loop.submit(job, self.events[job.id].put)

    def result(self, job_id: str) -> list[Event]:
        collected: list[Event] = []
        while not collected or not isinstance(collected[-1], (Usage, Failure)):
            collected.append(self.events[job_id].get(timeout=60))
        return collected


@pytest.fixture
def engine(tiny: Any) -> Iterator[Any]:
    running: list[Engine] = []

    def start(family: str, batching: Batching = ONE_BY_ONE) -> Engine:
        running.append(Engine(tiny(family), batching))
        return running[-1]

    yield start
    for each in running:
        each.loop.stop()


def params(family: str, prompt: str, steps: int, **extra: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"num_frames": 5} if family in VIDEO else {}
    own |= {"num_latent_frames_per_chunk": 2} if family == "helios" else {}
    if family == "qwen_image":
        own = {"negative_prompt": "dull", "true_cfg_scale": 2.0}
    return {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": steps, **own, **extra}


def job(family: str, index: int, prompt: str, steps: int, **extra: Any) -> Job:
    images = (red_png(),) if family == "wan_i2v" else ()
    return Job(
        id=f"{family}-{index}",
        model="m",
        group="m",
        params=params(family, prompt, steps, **extra),
        seed=index,
        images=images,
    )


def red_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def plain(pipe: DiffusionPipeline, job: Job) -> Any:
    extra = {"image": Image.open(io.BytesIO(job.images[0])).convert("RGB")} if job.images else {}
    output = pipe(**job.params, **extra, generator=torch.Generator("cpu").manual_seed(job.seed or 0))
    return np.asarray(output.images[0]) if hasattr(output, "images") else output.frames[0]


def pixels(events: list[Event]) -> Any:
    media = next(e for e in events if isinstance(e, Media))
    return np.asarray(Image.open(io.BytesIO(media.data)))


PROMPTS = [("a red circle", 4), ("a blue house", 6), ("a tall tree!", 5)]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - VIDEO))
def test_one_by_one_equals_the_plain_pipeline_bit_for_bit(family: str, engine: Any, tiny: Any) -> None:
    running = engine(family)
    jobs = [job(family, i, prompt, steps) for i, (prompt, steps) in enumerate(PROMPTS)]
    for each in jobs:
        running.submit(each)
    results = [running.result(each.id) for each in jobs]
    for each, events in zip(jobs, results, strict=True):
        assert isinstance(events[-1], Usage), events[-1]
        assert (pixels(events) == plain(tiny(family), each)).all()
    assert set(running.forwards) == {1}


@pytest.mark.parametrize("family", sorted(VIDEO))
def test_videos_come_out_whole(family: str, engine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[Any] = []
    monkeypatch.setattr("omni_ray.engine.media.encode_video", lambda frames, fps: clips.append(frames) or b"mp4")
    running = engine(family)
    running.submit(job(family, 0, "a wave", 4))
    events = running.result(f"{family}-0")
    media = next(e for e in events if isinstance(e, Media))
    assert (media.num_frames, media.height, media.width) == (5, 64, 64)
    assert np.array_equal(clips[0], plain(tiny(family), job(family, 0, "a wave", 4)))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - VIDEO))
def test_joined_forwards_stay_within_the_tolerance(family: str, engine: Any, tiny: Any) -> None:
    running = engine(family, Batching())
    jobs = [job(family, i, prompt, steps) for i, (prompt, steps) in enumerate(PROMPTS)]
    for each in jobs:
        running.submit(each)
    results = [running.result(each.id) for each in jobs]
    assert max(running.forwards) == len(jobs), "no forward was shared"
    for each, events in zip(jobs, results, strict=True):
        difference = np.abs(pixels(events).astype(int) - plain(tiny(family), each).astype(int)).max()
        assert difference <= BATCH_TOLERANCE


def test_each_step_is_told(engine: Any) -> None:
    running = engine("flux", Batching())
    running.submit(job("flux", 0, "a", 4))
    events = running.result("flux-0")
    steps = [(e.step, e.num_steps) for e in events if isinstance(e, StepEvent)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    usage = events[-1]
    assert isinstance(usage, Usage)
    assert (usage.steps_computed, usage.steps_skipped, usage.seed) == (4, 0, 0)
    assert 0 < usage.device_s <= usage.run_s


def test_each_forward_is_told(engine: Any) -> None:
    running = engine("flux", Batching())
    for i in range(2):
        running.submit(job("flux", i, "a", 4))
    costs = [running.result(f"flux-{i}")[-1] for i in range(2)]
    assert sum(num_calls for component, num_calls, *_ in running.told if component == "transformer") == 2 * 4
    assert sum(seconds for *_, seconds, _ in running.told) == pytest.approx(sum(cost.device_s for cost in costs))


def test_lanes_join_and_leave_at_every_step(engine: Any) -> None:
    running = engine("flux", Batching(max_num_seqs=8))
    steps = [3, 5, 8, 8]
    for i, n in enumerate(steps):
        running.submit(job("flux", i, "a", n))
    for i in range(len(steps)):
        running.result(f"flux-{i}")
    denoise = 3 * [4] + 2 * [3] + 3 * [2]
    assert sorted(running.forwards, reverse=True)[: len(denoise)] >= denoise


def test_cancel_unwinds_within_one_step_and_others_do_not_notice(engine: Any, tiny: Any) -> None:
    running = engine("flux", ONE_BY_ONE)
    running.submit(job("flux", 0, "a", 400))
    running.submit(job("flux", 1, "b", 20))
    while not isinstance(running.events["flux-0"].get(timeout=60), StepEvent):
        pass
    running.loop.cancel("flux-0")
    events = running.result("flux-0")
    assert isinstance(events[-1], Failure)
    assert isinstance(events[-1].error, Cancelled)
    assert sum(isinstance(e, StepEvent) for e in events) <= 10  # what was underway when the cancel arrived
    assert (pixels(running.result("flux-1")) == plain(tiny("flux"), job("flux", 1, "b", 20))).all()


def test_cancel_before_the_first_step(engine: Any) -> None:
    running = engine("flux", Batching(max_num_seqs=1))
    running.submit(job("flux", 0, "a", 30))
    running.submit(job("flux", 1, "b", 3))
    running.loop.cancel("flux-1")
    events = running.result("flux-1")
    assert isinstance(events[-1], Failure)
    assert len(events) == 1
    assert isinstance(running.result("flux-0")[-1], Usage)


def test_a_failing_request_leaves_the_others_alone(engine: Any, tiny: Any) -> None:
    running = engine("flux", ONE_BY_ONE)
    running.submit(job("flux", 0, "a", 3, height=-16))
    running.submit(job("flux", 1, "b", 4))
    failure = running.result("flux-0")[-1]
    assert isinstance(failure, Failure)
    assert "FluxPipeline failed" in failure.error.message
    assert (pixels(running.result("flux-1")) == plain(tiny("flux"), job("flux", 1, "b", 4))).all()


def test_a_short_request_overtakes_a_long_one(engine: Any) -> None:
    running = engine("flux", ONE_BY_ONE)
    running.submit(job("flux", 0, "long", 150, height=128, width=128))
    while not isinstance(running.events["flux-0"].get(timeout=60), StepEvent):
        pass
    running.submit(job("flux", 1, "short", 4))
    running.result("flux-1")
    ended = time.perf_counter()
    running.result("flux-0")
    assert time.perf_counter() - ended > 0.05, "the long request ended first"


def test_tiny_checkpoints_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = build("flux", tmp_path / "a"), build("flux", tmp_path / "b")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_fails_together_is_tried_one_by_one(engine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("flux")
    forward = pipe.transformer.forward

    def alone_only(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if len(hidden_states) > 1:
            raise IndexError("two are too many")
        return forward(hidden_states=hidden_states, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", alone_only)
    running = engine("flux", Batching())
    jobs = [job("flux", i, "a", 4) for i in range(3)]
    for each in jobs:
        running.submit(each)
    for each in jobs:
        assert isinstance(running.result(each.id)[-1], Usage)


def test_a_panic_is_answered(engine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("as a Rust library's is")

    monkeypatch.setattr(type(tiny("flux")), "encode_prompt", panic)
    running = engine("flux")
    running.submit(job("flux", 0, "a", 4))
    failure = running.result("flux-0")[-1]
    assert isinstance(failure, Failure)
    assert "Panic" in failure.error.message


def test_a_lane_knows_its_device_without_a_look_at_every_module(
    engine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine("flux")
    looks: list[str] = []
    for name, part in tiny("flux").components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "modules", lambda name=name: iter(looks.append(name) or ()), raising=False)
    running.submit(job("flux", 0, "a", 2))
    assert isinstance(running.result("flux-0")[-1], Usage)
    assert looks == []


def test_an_ended_lane_is_freed_at_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[weakref.ref[Any]] = []
    start = lane.Lane.start
    monkeypatch.setattr(lane.Lane, "start", lambda self: (lanes.append(weakref.ref(self)), start(self)))
    running = Engine(tiny("flux"), Batching())
    gc.collect()
    gc.disable()
    try:
        for i in range(3):
            running.submit(job("flux", i, "a", 2))
            running.result(f"flux-{i}")
        running.loop.stop()
        del running
        deadline = time.monotonic() + 10
        while any(ref() is not None for ref in lanes):
            assert time.monotonic() < deadline, "a reference cycle keeps lanes"
            time.sleep(0.05)
    finally:
        gc.enable()
    assert len(lanes) == 3
