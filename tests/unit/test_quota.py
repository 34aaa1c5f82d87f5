"""What the router counts of each API key."""

from __future__ import annotations

import pytest

from omni_ray.errors import OverLimit, Overloaded
from omni_ray.messages import Job, Owner
from omni_ray.router import quota
from omni_ray.router.jobs import JobRecord
from omni_ray.router.queue import GroupQueue
from omni_ray.router.quota import Quotas


def test_the_rate_is_of_any_60_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, now = Quotas(), 1000.0
    monkeypatch.setattr(quota.time, "monotonic", lambda: now)
    quotas.count("a", 2)
    now = 1030.0
    quotas.count("a", 2)
    now = 1059.0
    with pytest.raises(OverLimit) as refused:
        quotas.count("a", 2)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    now = 1060.0
    quotas.count("a", 2)
    with pytest.raises(OverLimit):
        quotas.count("a", 2)


def test_outstanding_seconds_are_of_unfinished_jobs() -> None:
    quotas = Quotas()
    owner = Owner(key="a", outstanding_s=10.0)
    jobs = [Job(id=str(i), model="d", group="d", params={}, owner=owner) for i in range(4)]
    first, second, third, huge = (JobRecord(job=j, cost_s=s) for j, s in zip(jobs, (6, 3, 3, 99), strict=True))
    quotas.admit(first)
    quotas.admit(second)
    with pytest.raises(OverLimit, match=r"2 unfinished jobs of 9\.0 s.* need 3\.0 s.* outstanding_s is 10") as refused:
        quotas.admit(third)
    assert refused.value.retry_after_s == pytest.approx(2.0)
    first.progress = 0.5
    quotas.admit(third)
    for record in (first, second, third):
        quotas.leave(record)
    quotas.admit(huge)  # the first one passes whatever its estimate
    with pytest.raises(OverLimit):
        quotas.admit(first)
    quotas.admit(JobRecord(job=Job(id="9", model="d", group="d", params={}, owner=Owner(key="b")), cost_s=99.0))


async def test_the_queues_of_all_groups_share_a_quota() -> None:
    quotas, owner = Quotas(), Owner(key="a", outstanding_s=10.0)
    one, other, full = (GroupQueue(name, size, lambda: 1, quotas) for name, size in (("1", 9), ("2", 9), ("3", 0)))
    first, second = (
        JobRecord(job=Job(id=name, model="d", group="d", params={}, owner=owner), cost_s=6.0) for name in "xy"
    )
    with pytest.raises(Overloaded, match="its limit is 0"):
        full.admit(first)
    one.admit(first)
    with pytest.raises(OverLimit):
        other.admit(second)
    assert not other.queued
    quotas.admit(second, always=True)
    await other.leave(second)
    await one.leave(first)
    other.admit(second)
