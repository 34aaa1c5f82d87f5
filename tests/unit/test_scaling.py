"""How many replicas the work wants, through Ray Serve's own bounds and delays."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _apply_autoscaling_config, _resolve_policy_callable
from ray.serve.config import AutoscalingConfig

from omni_ray.config.spec import Autoscaling, DitGroup
from omni_ray.replica.scaling import BUSY, KV_USE, OUTSTANDING_S, WAITING_TOKENS, ByTokens, config_of, slope

BOUNDS = Autoscaling(min_replicas=1, max_replicas=8, target_outstanding_s=10, upscale_delay_s=2, downscale_delay_s=20)


def group(kind: Any, bounds: Autoscaling = BOUNDS) -> Any:
    return kind(type="dit" if kind is DitGroup else "ar", name="m", source="x", autoscaling=bounds)


class Serve:
    """Asks a group's policy as Ray Serve's controller does, once a second, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Any, bounds: Autoscaling = BOUNDS) -> None:
        self.config = AutoscalingConfig(**config_of(group(kind, bounds)))
        policy: Any = self.config.policy
        self.decide = _apply_autoscaling_config(_resolve_policy_callable(policy))
        self.now, self.num, self.state = 1000.0, bounds.min_replicas, dict[str, Any]()
        self.told: list[Any] = []
        monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: self.now)

    def second(self, outstanding_s: float, requests: float = 0.0, busy: float = 0.0) -> int:
        self.now += 1
        self.told = [*self.told, SimpleNamespace(timestamp=self.now, value=outstanding_s)][-10:]
        now = [SimpleNamespace(timestamp=self.now, value=busy)]
        metrics = {OUTSTANDING_S: {"replica": self.told}, BUSY: {"replica": now}} if self.num else {}
        context: Any = SimpleNamespace(
            raw_metrics=metrics,
            current_num_replicas=self.num,
            target_num_replicas=self.num,
            total_num_requests=requests,
            policy_state=self.state,
            config=self.config,
        )
        wanted, self.state = self.decide(context)
        self.num = max(BOUNDS.min_replicas, min(wanted, BOUNDS.max_replicas))
        return self.num


def test_a_load_that_triples_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch, DitGroup)
    nums = [serve.second(10) for _ in range(20)] + [serve.second(30) for _ in range(60)]
    assert nums[19] == 1
    assert nums[-1] == 3
    nums += [serve.second(10) for _ in range(60)]
    assert nums[-1] == 1
    changes = [after - before for before, after in itertools.pairwise(nums) if after != before]
    assert sum(change < 0 for change in changes[: changes.index(min(changes))]) <= 1, nums  # it does not flap


def test_a_rising_load_is_met_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, rising = (Serve(monkeypatch, DitGroup) for _ in range(2))
    for i in range(12):
        steady.second(20)
        rising.second(10 + i)
    assert (steady.num, rising.num) == (2, 3)


def test_a_short_peak_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch, DitGroup)
    nums = [serve.second(each) for each in [5] * 12 + [50] + [5] * 12]
    assert set(nums) == {1}


def test_replicas_that_are_busy_stay_though_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch, DitGroup)
    nums = [serve.second(50, busy=1) for _ in range(10)] + [serve.second(4, busy=2.3) for _ in range(60)]
    assert (max(nums), nums[-1]) == (5, 3)
    assert [serve.second(4, busy=0.7) for _ in range(60)][-1] == 1
    assert [serve.second(4, busy=2.3) for _ in range(60)][-1] == 1  # it is no reason for more of them


def test_slope_is_a_change_a_second() -> None:
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 1)]) == slope([]) == slope([(1, 1), (1, 2)]) == 0


@pytest.mark.parametrize(
    ("requests", "waiting", "kv_use", "wanted"),
    [(64, 0, 0.1, 2.0), (1, 0, 1.35, 1.5), (1, 16_384, 0.1, 3.0), (1, 0, 0.18, 0.2)],
)
def test_tokens_that_wait_and_a_full_cache_want_more(
    requests: float, waiting: float, kv_use: float, wanted: float
) -> None:
    told = {WAITING_TOKENS: waiting, KV_USE: kv_use}
    metrics = {name: {"replica": [SimpleNamespace(timestamp=0.0, value=value)]} for name, value in told.items()}
    context: Any = SimpleNamespace(
        raw_metrics=metrics, current_num_replicas=2, target_num_replicas=2, total_num_requests=requests
    )
    assert ByTokens(BOUNDS.model_dump())(context)[0] == pytest.approx(wanted)
