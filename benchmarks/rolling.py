"""Changes of a deployment that roll through its groups under load: how many requests were answered, and how.

    unshare --net sh -c 'ip link set lo up; exec .venv/bin/python -m benchmarks.rolling'

A head and two workers, which are namespaces of this machine, serve two replicas of each demo model. While chats, images
and videos are asked for without a pause, the file is deployed again with a change of one group, and then of another.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.chaos.deployment import CHAT_ENGINE, write
from benchmarks.chaos.faults import Striker
from benchmarks.chaos.nodes import Cluster, cluster
from benchmarks.chaos.traffic import Outcome, Traffic

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("TeaCache in demo-image", {"demo-image": {"cache": {"kind": "teacache", "threshold": 0.2}}}),
    ("another threshold", {"demo-image": {"cache": {"kind": "teacache", "threshold": 0.3}}}),
    ("int8 in demo-video", {"demo-video": {"quantization": {"kind": "int8"}}}),
    ("half the context in demo-chat", {"demo-chat": {"engine_args": CHAT_ENGINE | {"max_model_len": 1024}}}),
]
LONGEST_S = 900
NUM_REPLICAS = {"demo-chat": 2, "demo-image": 2, "demo-video": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="go on until so many have been answered")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rolling-", dir="/var/tmp"))
    try:
        with cluster(folder, num_workers=2) as nodes:
            run(nodes, folder, args.requests)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(nodes: Cluster, folder: Path, num_requests: int) -> None:
    striker = Striker(nodes, seed=0)
    nodes.deploy(write(folder / "omni.yaml", folder / "jobs"))
    striker.wait_until_whole(NUM_REPLICAS)
    traffic = Traffic(striker.addresses)
    traffic.start()
    changed: dict[str, dict[str, Any]] = {}
    for title, change in CHANGES:
        time.sleep(10)
        changed |= change
        began, before, old = time.monotonic(), len(traffic.outcomes), striker.replicas()
        nodes.deploy(write(folder / "omni.yaml", folder / "jobs", change=changed))
        wait_until_anew(striker, old)
        seconds = time.monotonic() - began
        print(
            f"{title}: rolled through in {seconds:.0f} s, {len(traffic.outcomes) - before} requests meanwhile",
            flush=True,
        )
    while len(traffic.outcomes) < num_requests:
        time.sleep(1)
    traffic.stop()
    report(traffic.outcomes)


def wait_until_anew(striker: Striker, old: set[int]) -> None:
    """Wait until all replicas run and none of the ``old`` processes is among them."""
    deadline = time.monotonic() + LONGEST_S
    while old & striker.replicas() or not striker.is_whole(NUM_REPLICAS):
        if time.monotonic() > deadline:
            raise SystemExit(f"not rolled through after {LONGEST_S} s")
        time.sleep(0.5)


def report(outcomes: list[Outcome]) -> None:
    answered = [each for each in outcomes if each.answer is not None]
    print(f"{len(answered)} of {len(outcomes)} requests answered: {dict(Counter(o.kind.name for o in answered))}")
    print(f"errors: {dict(Counter(error for each in outcomes for _, error in each.errors)) or 'none'}")
    print(f"sent again: {dict(Counter(why for each in outcomes for _, why in each.retries)) or 'none'}")


if __name__ == "__main__":
    main()
