"""What a server tells of itself at ``/ready``, and how a person reads it."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from omni_ray.errors import without_traceback

GIB = 2**30


def ask_ready(url: str, timeout_s: float, verify: bool = True) -> dict[str, Any] | None:
    """``{"ready": bool, "groups": [GroupStatus as an object, ...]}``; None while nothing of ours answers there.

    Without ``verify`` any TLS certificate will do, as for a server that this process started.
    """
    context = None if verify or not url.startswith("https") else ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=timeout_s, context=context) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:  # 503 while a model loads, with the same body
        try:
            answer = json.load(error)
        except (ValueError, OSError, http.client.HTTPException):
            return None
    except (ValueError, OSError, http.client.HTTPException):
        return None
    return answer if isinstance(answer, dict) and "groups" in answer else None


def phase_of(group: dict[str, Any]) -> tuple[str, str]:
    """The phase that a group is in, and how far in it: of its replicas, the one that has furthest to go."""
    states: dict[str, int] = group["replicas"]
    num_replicas = sum(states.values())
    num_ready = states.get("RUNNING", 0)
    if group["ready"] and num_ready == num_replicas:
        return "ready", _replicas(num_ready, num_replicas)
    # Those of dead replicas come first and stay, so only the latest count.
    loading = [each for each in group["progress"][-max(num_replicas, 1) :] if each["phase"] != "ready"]
    if not loading:
        # Ray Serve's message tells why no replica has begun; once one has loaded it has nothing to add.
        phase, message = ("loaded", "") if group["progress"] else ("starting", group["message"])
        return ("ready" if group["ready"] else phase), _replicas(num_ready, num_replicas) or message
    last = min(loading, key=_distance)
    return last["phase"], " ".join(_detail(last, num_ready, num_replicas))


def _distance(progress: dict[str, Any]) -> tuple[int, float]:
    order = ["failed", "starting", "loading weights", "compiling"]
    return order.index(progress["phase"]), progress["done_bytes"]


def _detail(progress: dict[str, Any], num_ready: int, num_replicas: int) -> Iterable[str]:
    if progress["phase"] == "loading weights" and progress["total_bytes"]:
        unit, size = ("GiB", GIB) if progress["total_bytes"] >= GIB / 10 else ("MiB", 2**20)
        yield f"{progress['done_bytes'] / size:.2f}/{progress['total_bytes'] / size:.2f} {unit}"
    if progress["detail"]:
        yield without_traceback(progress["detail"])
    if replicas := _replicas(num_ready, num_replicas):
        yield replicas


def _replicas(num_ready: int, num_replicas: int) -> str:
    return f"({num_ready} of {num_replicas} replicas ready)" if num_replicas > 1 else ""
