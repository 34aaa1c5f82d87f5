"""The router's parts without Ray: what work costs, who waits where, what happens when a replica dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.schema import DeploymentStatusOverview

from omni_ray.config.spec import Autoscaling, DitGroup
from omni_ray.errors import ConfigError, Overloaded, Unavailable
from omni_ray.messages import Event, Failure, Job, Media, Snapshot, StepEvent, Usage
from omni_ray.router import outstanding
from omni_ray.router.cost import CostModel
from omni_ray.router.estimate import play_forward
from omni_ray.router.group import GroupDispatcher
from omni_ray.router.jobs import JobRecord
from omni_ray.router.queue import GroupQueue
from omni_ray.router.quota import Quotas
from omni_ray.router.router import Router, is_ready


def job(name: str = "j", steps: int = 20, size: int = 1024, n: int = 1, **params: Any) -> Job:
    return Job(
        id=name,
        model="m",
        group="m",
        params={"num_inference_steps": steps, "height": size, "width": size, **params},
        num_outputs=n,
    )


def true_cost(each: Job) -> float:
    steps, megapixels = each.params["num_inference_steps"], each.params["height"] * each.params["width"] / 1e6
    return float(steps * (0.02 + 0.15 * megapixels * each.num_outputs) + 0.3 * megapixels * each.num_outputs)


def test_costs_are_learnt_from_what_was_measured() -> None:
    model = CostModel()
    for steps, size, n in [(20, 256, 1), (28, 512, 2), (50, 1024, 1), (10, 768, 4), (35, 1536, 1), (25, 512, 1)] * 3:
        model.learn(job(steps=steps, size=size, n=n), true_cost(job(steps=steps, size=size, n=n)))
    for unseen in (job(steps=40, size=640), job(steps=12, size=1280, n=2)):
        assert model.estimate_s(unseen) == pytest.approx(true_cost(unseen), rel=0.05)


def test_a_job_that_was_held_up_counts_for_little() -> None:
    model, sizes = CostModel(), [512, 768, 1024]
    for size in sizes * 3:
        model.learn(job(size=size), true_cost(job(size=size)))
    for size in sizes:
        model.learn(job(size=size), true_cost(job(size=size)) + 26)
    for size in sizes:
        assert model.estimate_s(job(size=size)) == pytest.approx(true_cost(job(size=size)), rel=0.35)


def test_guidance_doubles_the_work() -> None:
    model = CostModel()
    assert model.estimate_s(job(negative_prompt="dull")) > 1.8 * model.estimate_s(job()) - 0.5


async def places(queue: GroupQueue, record: JobRecord) -> list[int]:
    return [place async for place in queue.wait_turn(record)]


async def test_the_queue_is_first_in_first_out_and_tells_the_place() -> None:
    queue = GroupQueue("m", max_queued=8, num_replicas=lambda: 1, places_each=1)
    records = [JobRecord(job=job(str(i)), cost_s=2.0) for i in range(3)]
    for record in records:
        queue.admit(record)
    assert await places(queue, records[0]) == []
    assert queue.estimate_s(records[2]) == pytest.approx((4.0, 6.0))
    waiting = [asyncio.create_task(places(queue, record)) for record in records[1:]]
    await asyncio.sleep(0)
    await queue.leave(records[0])
    assert await waiting[0] == [0]
    await queue.leave(records[1])
    assert await waiting[1] == [1, 0]
    assert queue.outstanding_s == pytest.approx(2.0)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue = GroupQueue("m", max_queued=2, num_replicas=lambda: 1, places_each=1)
    records = [JobRecord(job=job(str(i)), cost_s=30.0) for i in range(3)]
    for record in records:
        queue.admit(record, always=True)
    assert await places(queue, records[0]) == []
    for expected in (30.0, 60.0, 90.0):  # whoever was refused before comes back first
        with pytest.raises(Overloaded, match=r"2 requests queued and \d announced, and its limit is 2") as refused:
            queue.admit(JobRecord(job=job("x"), cost_s=30.0))
        assert refused.value.retry_after_s == pytest.approx(expected)


async def test_a_free_place_is_kept_for_who_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr("omni_ray.router.queue.time", clock)
    queue = GroupQueue("m", max_queued=1, num_replicas=lambda: 1, places_each=1)
    first, second, new = (JobRecord(job=job(name), cost_s=30.0) for name in "abc")

    def refused() -> float:
        with pytest.raises(Overloaded) as error:
            queue.admit(new)
        return error.value.retry_after_s or 0.0

    queue.admit(first)
    assert await places(queue, first) == []
    queue.admit(second)
    assert refused() == pytest.approx(30.0)
    await queue.leave(first)
    assert await places(queue, second) == []  # now the queue is empty
    clock.now += 29.0
    assert refused() == pytest.approx(30.0)  # the next one after the one that is announced
    clock.now += 1.0
    queue.admit(new)  # the one that was told to come now
    assert refused() == pytest.approx(60.0)
    await queue.leave(new)
    clock.now += 100.0
    queue.admit(new)  # nobody came


async def test_an_idle_group_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr("omni_ray.router.queue.time", clock)
    queue = GroupQueue("m", max_queued=2, num_replicas=lambda: 1, places_each=1)
    records = [JobRecord(job=job(str(i)), cost_s=30.0) for i in range(2)]
    for record in records:
        queue.admit(record)
    for _ in range(5):  # of whom none comes back
        with pytest.raises(Overloaded):
            queue.admit(JobRecord(job=job("x"), cost_s=30.0))
    for record in records:
        await queue.leave(record)
    queue.admit(records[0])


async def test_who_comes_back_too_early_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr("omni_ray.router.queue.time", clock)
    queue = GroupQueue("m", max_queued=1, num_replicas=lambda: 1, places_each=1)
    records = [JobRecord(job=job(str(i)), cost_s=30.0) for i in range(3)]
    for record in records[:2]:
        queue.admit(record, always=True)
    assert await places(queue, records[0]) == []
    for expected in (30.0, 60.0, 90.0):
        with pytest.raises(Overloaded) as refused:
            queue.admit(records[2])
        assert refused.value.retry_after_s == pytest.approx(expected)
    clock.now += 30.0  # the first of them is due, but the job that runs takes longer than was thought
    with pytest.raises(Overloaded) as refused:
        queue.admit(records[2])
    assert refused.value.retry_after_s == pytest.approx(30.0)


def test_the_queue_is_played_forward() -> None:
    # Two places on one device: both running jobs go at half speed, until the shorter one ends at 4.
    ends, starts = play_forward([2.0, 5.0], [3.0], num_replicas=1, num_places=2)
    assert (ends, starts) == (pytest.approx([4.0, 10.0, 10.0]), pytest.approx([4.0]))
    # Two devices: each job has one for itself.
    ends, starts = play_forward([2.0, 5.0], [3.0], num_replicas=2, num_places=2)
    assert (ends, starts) == (pytest.approx([2.0, 5.0, 5.0]), pytest.approx([2.0]))
    # A lone job is no faster for a second device.
    assert play_forward([], [4.0], num_replicas=2, num_places=2) == ([4.0], [0.0])


class Replicas:
    """Stands where Serve's handle stands; each entry of ``script`` is what one attempt yields, or raises."""

    deployment_name = "m"

    def __init__(self, script: list[list[Event | Exception]]) -> None:
        self.script = script
        self.run = self
        self.asked: list[Job] = []

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, each: Job) -> Stream:
        self.asked.append(each)
        return Stream(self.script.pop(0))


class Stream:
    def __init__(self, items: list[Event | Exception]) -> None:
        self.items = items

    async def __aiter__(self) -> AsyncIterator[Event]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        pass


STEP = StepEvent(job_id="j", step=1, num_steps=2, seconds=0.1)
MEDIA = Media(job_id="j", index=0, format="png", data=b"x", width=1, height=1)
USAGE = Usage(job_id="j", seed=1, steps_computed=2, steps_skipped=0, device_s=1.0, queue_s=0.0, run_s=1.0)


async def run(script: list[list[Event | Exception]]) -> list[Event]:
    group = DitGroup(type="dit", name="m", source="x")
    handle: Any = Replicas(script)
    dispatcher = GroupDispatcher(group, handle, Quotas())
    return [event async for event in dispatcher.run(dispatcher.admit(job()))]


async def test_a_job_whose_replica_dies_runs_again_and_its_media_come_once() -> None:
    events = await run([[STEP, MEDIA, RayActorError()], [STEP, MEDIA, USAGE]])
    assert [type(event) for event in events] == [StepEvent, StepEvent, Media, Usage]
    assert not outstanding.remaining_s


async def test_a_lost_job_goes_on_from_its_last_snapshot() -> None:
    snapshot = Snapshot(job_id="j", step=1, data=b"latents")
    replicas = Replicas([[STEP, snapshot, RayActorError()]] + [[RayActorError()]] * 2 + [[USAGE]])
    handle: Any = replicas
    dispatcher = GroupDispatcher(DitGroup(type="dit", name="m", source="x"), handle, Quotas())
    events = [event async for event in dispatcher.run(dispatcher.admit(job()))]
    assert isinstance(events[-1], Usage)
    assert [each.resume for each in replicas.asked] == [None, b"latents", b"latents", b"latents"]
    assert len({each.id for each in replicas.asked}) == 4


@pytest.mark.parametrize(
    ("min_replicas", "status", "states", "wanted"),
    [
        (1, "HEALTHY", {"RUNNING": 1}, True),
        (1, "UPSCALING", {"STARTING": 1}, False),
        (1, "HEALTHY", {}, False),
        (0, "HEALTHY", {}, True),
        (0, "UPSCALING", {"STARTING": 1}, True),
        (0, "DEPLOY_FAILED", {}, False),
    ],
)
def test_a_group_that_may_have_no_replica_is_ready_without(
    min_replicas: int, status: str, states: dict[str, int], wanted: bool
) -> None:
    bounds = Autoscaling(min_replicas=min_replicas, max_replicas=2)
    group = DitGroup(type="dit", name="m", source="demo:image", autoscaling=bounds)
    overview: Any = DeploymentStatusOverview(status, "UNSPECIFIED", states, "")  # type: ignore[arg-type]
    assert is_ready(group, overview) is wanted
    assert not is_ready(group, None)


def test_the_bound_of_a_queue_changes_in_place() -> None:
    router, handle = Router.__new__(Router), None
    dispatcher = GroupDispatcher(DitGroup(type="dit", name="m", source="x"), handle, Quotas())  # type: ignore[arg-type]
    router._groups = {"m": dispatcher}
    router.reconfigure({"m": {"queue": {"max_queued_requests": 3}}})
    assert dispatcher.queue.max_queued == 3
    with pytest.raises(ConfigError, match="'x' is no DiT group; there are m"):
        router.reconfigure({"x": {}})


async def test_three_lost_replicas_end_in_one_clear_error() -> None:
    events = await run([[STEP, RayActorError()]] * 3)
    assert isinstance(events[-1], Failure)
    assert isinstance(events[-1].error, Unavailable)
    assert "lost its replica 3 times" in events[-1].error.message
