"""``omni-ray status``: what a running server is doing."""

from __future__ import annotations

import sys
from typing import Any

from omni_ray.cli.ready import ask_ready, phase_of
from omni_ray.cli.table import table

TIMEOUT_S = 10.0
HEAD = ("MODEL", "STATE", "REPLICAS", "RUNNING", "QUEUED", "WORK AHEAD", "")


def status(address: str) -> int:
    """Print a row per group. 0 when the server is ready, 1 when it is not, or does not answer."""
    answer = ask_ready(address.rstrip("/"), TIMEOUT_S)
    if answer is None:
        print(f"no omni_ray answers at {address} within {TIMEOUT_S:.0f} s", file=sys.stderr)
        return 1
    print(table([HEAD, *map(_row, answer["groups"])]))
    return 0 if answer["ready"] else 1


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    phase, detail = phase_of(group)
    replicas = ", ".join(f"{num} {state.lower()}" for state, num in group["replicas"].items() if num) or "none"
    work = f"{group['outstanding_s']:.1f} s"
    return group["group"], phase, replicas, str(group["num_running"]), str(group["num_queued"]), work, detail
