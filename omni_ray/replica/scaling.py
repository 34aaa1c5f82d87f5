"""How many replicas a group should have, by the work that waits for it. Ray Serve calls these in its controller.

Bounds and delays are Ray Serve's own, from the group's ``autoscaling`` block. The replicas tell the figures
(`record_autoscaling_stats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from omni_ray.config.spec import ArGroup, Autoscaling, DitGroup

Decision = tuple[float, dict[str, Any]]

OUTSTANDING_S, BUSY = "outstanding_s", "busy_replicas"
WAITING_TOKENS, KV_USE = "waiting_tokens", "kv_use"

MOST_BUSY = 0.8
"""Part of their time that a group's replicas may be busy, on average, when one of them goes. Jobs come at random: with
fewer replicas that are busier, work would pile up and they would be wanted again."""

FULL_KV = 0.9
"""Use of the KV cache, as a part of it, from which on requests are soon put back into the queue."""


def config_of(group: ArGroup | DitGroup) -> dict[str, Any]:
    """Ray Serve's ``autoscaling_config`` of a group that has an ``autoscaling`` block."""
    bounds = group.autoscaling
    assert bounds is not None
    policy = ByOutstandingSeconds if isinstance(group, DitGroup) else ByTokens
    return {
        "min_replicas": bounds.min_replicas,
        "max_replicas": bounds.max_replicas,
        "upscale_delay_s": bounds.upscale_delay_s,
        "downscale_delay_s": bounds.downscale_delay_s,
        "downscale_to_zero_delay_s": bounds.downscale_to_zero_delay_s,
        "look_back_period_s": bounds.look_back_period_s,
        "target_ongoing_requests": bounds.target_ongoing_requests,
        "policy": AutoscalingPolicy(
            policy_function=f"{__name__}:{policy.__name__}", policy_kwargs={"bounds": bounds.model_dump()}
        ),
    }


class ByOutstandingSeconds:
    """For DiT groups: so many replicas that each has ``target_outstanding_s`` seconds of work before it, of that which
    there will be when a further replica could be up. Of those that there are, as many stay as the work of late needs,
    even if little of it waits, which is what enough replicas bring about."""

    def __init__(self, bounds: dict[str, Any]) -> None:
        self._bounds = Autoscaling.model_validate(bounds)

    def __call__(self, context: AutoscalingContext) -> Decision:
        series = _series(context.raw_metrics, OUTSTANDING_S)
        if not series:
            return float(context.target_num_replicas), {}
        expected_s = series[-1][1] + max(slope(series), 0.0) * self._bounds.upscale_delay_s
        by_work = expected_s / self._bounds.target_outstanding_s
        kept = min(max(_latest(context.raw_metrics, BUSY), default=0.0) / MOST_BUSY, context.target_num_replicas)
        return max(by_work, kept if kept > 1 else 0.0), {}


class ByTokens:
    """For AR groups: room for the requests in flight, the prompts that wait, and the KV cache."""

    def __init__(self, bounds: dict[str, Any]) -> None:
        self._bounds = Autoscaling.model_validate(bounds)

    def __call__(self, context: AutoscalingContext) -> Decision:
        now = context.current_num_replicas
        if now == 0:
            return float(context.target_num_replicas), {}
        waiting, kv_use = (sum(_latest(context.raw_metrics, name)) for name in (WAITING_TOKENS, KV_USE))
        by_requests = context.total_num_requests / self._bounds.target_ongoing_requests
        by_kv = kv_use / FULL_KV
        by_waiting = now + waiting / self._bounds.target_waiting_tokens if waiting else 0.0
        return max(by_requests, by_kv, by_waiting), {}


def slope(series: Sequence[tuple[float, float]]) -> float:
    """Change a second, by least squares, of ``(time in seconds, value)``."""
    if len(series) < 2:
        return 0.0
    times, values = zip(*series, strict=True)
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    spread = sum((each - mean_time) ** 2 for each in times)
    return sum((t - mean_time) * (v - mean_value) for t, v in series) / spread if spread else 0.0


def _series(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], name: str) -> list[tuple[float, float]]:
    """What the replica with the most to tell has told of the whole group, by time."""
    told = max((metrics or {}).get(name, {}).values(), key=len, default=())
    return [(each.timestamp, each.value) for each in told]


def _latest(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], name: str) -> list[float]:
    """The last value of each replica."""
    return [each[-1].value for each in (metrics or {}).get(name, {}).values() if each]
