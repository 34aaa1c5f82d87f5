"""The store of jobs: records in SQLite and files in a folder."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from omni_ray.api.background import job_object
from omni_ray.config.spec import JobStore
from omni_ray.errors import ConfigError
from omni_ray.messages import Job, Media, StepEvent
from omni_ray.router import runner
from omni_ray.store import records
from omni_ray.store.store import Store
from omni_ray.store.stored import StoredJob


def stored(number: int = 0, **changes: Any) -> StoredJob:
    job = Job(id=f"job_{number}", model="m", group="g", params={"prompt": "a fox", "num_inference_steps": 4}, seed=3)
    made = StoredJob(id=job.id, kind="image", job=job, created_at=1000.0 + number, expires_at=time.time() + 60)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(JobStore(folder=str(tmp_path / "jobs")))


async def test_a_job_comes_back_as_it_was(store: Store) -> None:
    job = stored(request={"prompt": "a fox"}, user="ann", num_images=1, has_mask=True)
    assert await store.create(job, [b"image"], b"mask", "me")
    assert await store.get(job.id) == job
    whole = await store.whole_job(job)
    assert (whole.images, whole.mask, whole.resume) == ((b"image",), b"mask", None)


async def test_a_job_is_created_once(store: Store) -> None:
    assert await store.create(stored(), [], None, "me")
    assert not await store.create(stored(step=3), [], None, "you")
    assert await store.get("job_0") == stored(expires_at=(await store.get("job_0") or stored()).expires_at)


async def test_only_the_owner_saves_and_only_until_it_is_over(store: Store) -> None:
    await store.create(stored(), [], None, "me")
    assert await store.save(stored(step=1), "me")
    assert not await store.save(stored(step=2), "you")
    assert await store.save(stored(status="completed"), "me")
    assert not await store.save(stored(status="failed"), "me")
    assert (await store.get("job_0") or stored()).status == "completed"


async def test_a_running_job_tells_its_skipped_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAVE_S", 0.0)
    await store.create(stored(), [], None, "me")
    work = runner._Work(store, "me", stored(), expire_after_s=60)
    told = []
    for step, computed in [(1, True), (2, False), (3, False), (1, True), (2, False)]:  # begun anew after the third
        await work._take(StepEvent(job_id="job_0", step=step, num_steps=4, seconds=0.1, computed=computed))
        job = job_object(await store.get("job_0") or stored())
        told.append((job["step"], job["steps_skipped"]))
    assert told == [(1, 0), (2, 1), (3, 2), (1, 0), (2, 1)]


async def test_pages_by_time_kind_and_user(store: Store) -> None:
    for number in range(5):
        await store.create(stored(number, user="ann" if number < 4 else "bob"), [], None, "me")
    await store.create(stored(9, kind="video", user="ann"), [], None, "me")

    async def ids(*args: Any, **kwargs: Any) -> list[str]:
        return [each.id for each in await store.page(*args, **kwargs)]

    assert await ids(("image",), "ann", 2, None, newest_first=True) == ["job_3", "job_2"]
    assert await ids(("image",), "ann", 9, "job_2", newest_first=True) == ["job_1", "job_0"]
    assert await ids(("image",), "ann", 9, "job_2", newest_first=False) == ["job_3"]
    assert await ids(("image", "video"), None, 9, None, newest_first=False) == [f"job_{i}" for i in (0, 1, 2, 3, 4, 9)]


async def test_what_nobody_renews_is_adopted_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.create(stored(0), [], None, "dead")
    await store.create(stored(1), [], None, "alive")
    assert await store.renew_and_adopt("me", ["g"]) == []
    now = time.time()
    monkeypatch.setattr(records.time, "time", lambda: now + records.LEASE_S + 1)
    assert await store.renew_and_adopt("alive", ["other"]) == []
    assert [each.id for each in await store.renew_and_adopt("me", ["g"])] == ["job_0"]
    assert await store.renew_and_adopt("you", ["g"]) == []
    assert not await store.save(stored(0, step=2), "dead")


async def test_a_snapshot_is_what_the_next_owner_goes_on_from(store: Store) -> None:
    job = stored()
    await store.create(job, [], None, "me")
    job = await store.add_snapshot(job, 3, b"latents")
    assert (await store.whole_job(job)).resume == b"latents"
    await store.drop_snapshot(job.id, 3)
    with pytest.raises(FileNotFoundError):
        await store.whole_job(job)


async def test_media_are_read_back_and_go_with_the_job(store: Store) -> None:
    job = stored()
    await store.create(job, [], None, "me")
    media = Media(job_id=job.id, index=0, format="png", data=b"png", width=4, height=2)
    job = await store.add_media(await store.add_media(job, media), media)
    assert [(each.file, each.num_bytes) for each in job.media] == [("output-0.png", 3)]
    assert await store.read(job.id, "output-0.png") == b"png"
    await store.delete(job.id)
    assert await store.get(job.id) is None
    with pytest.raises(FileNotFoundError):
        await store.read(job.id, "output-0.png")


async def test_what_is_old_or_too_much_goes(tmp_path: Path) -> None:
    store = Store(JobStore(folder=str(tmp_path), max_gib=2.5 / 2**30))
    for number, changes in enumerate(({"expires_at": 1.0}, {}, {}, {})):
        job = stored(number)
        await store.create(job, [], None, "me")
        media = Media(job_id=job.id, index=0, format="png", data=b"x", width=1, height=1)
        job = await store.add_media(job, media)
        await store.save(dataclasses.replace(job, status="completed", **changes), "me")
    await store.create(stored(7), [], None, "me")
    await store.expire()
    left = [each.id for each in await store.page(("image",), None, 9, None, newest_first=False)]
    assert left == ["job_2", "job_3", "job_7"]


async def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    store = Store(JobStore(folder=str(tmp_path), database="nonsense://x"))
    with pytest.raises(ConfigError, match=r"jobs\.database: 'nonsense://x'"):
        await store.get("x")


def test_an_address_needs_a_database() -> None:
    with pytest.raises(ValueError, match="name a database"):
        JobStore(folder="s3://bucket/jobs")
