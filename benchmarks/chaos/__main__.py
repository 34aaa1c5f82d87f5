"""Chat, image and video traffic on a head and two workers, while processes and nodes are killed, frozen and cut off.

    unshare --net sh -c 'ip link set lo up; exec .venv/bin/python -m benchmarks.chaos --minutes 20'

The nodes are namespaces of this machine (`nodes`). Every request has one right answer, known from before the first
fault. Prints what each fault cost, then what the clients saw.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.chaos.deployment import NAMES, write
from benchmarks.chaos.faults import Fault, Striker, all_faults
from benchmarks.chaos.nodes import FAST_NODE_CHECKS, Cluster, cluster
from benchmarks.chaos.report import HEAD, by_kind, line, summary, table, tolls
from benchmarks.chaos.traffic import Traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=20, help="seconds from one fault to the next")
    parser.add_argument("--only", default="", help="faults whose names contain this")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--pause", type=float, default=4, help="seconds that a client rests between two requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-logs", type=Path, help="where the logs of the nodes are moved to")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/var/tmp"))
    try:
        with cluster(folder, num_workers=2, settings=FAST_NODE_CHECKS) as nodes:
            run(nodes, folder, args)
    finally:
        if args.keep_logs:
            shutil.copytree(folder, args.keep_logs, symlinks=True, ignore_dangling_symlinks=True, ignore=_sockets)
        shutil.rmtree(folder, ignore_errors=True)


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_socket()]


def run(nodes: Cluster, folder: Path, args: argparse.Namespace) -> None:
    nodes.deploy(write(folder / "omni.yaml", folder / "jobs", args.replicas, names=args.models))
    striker = Striker(nodes, args.seed)
    num_replicas = dict.fromkeys(args.models, args.replicas)
    striker.wait_until_whole(num_replicas)
    traffic = Traffic(striker.addresses, args.pause, args.models)
    right = traffic.reference()
    before = traffic.stored_jobs()
    print(HEAD.split("  in flight")[0], flush=True)
    traffic.start()
    began = time.monotonic()
    faults = strike_all(striker, args, num_replicas)
    traffic.stop()
    striker.wait_until_whole(num_replicas)
    stored = traffic.stored_jobs() - before
    costs = tolls(faults, traffic.outcomes)
    print(table(faults, costs))
    told = {"seconds": round(time.monotonic() - began), "faults": by_kind(faults, costs)}
    told |= summary(traffic.outcomes, right, stored)
    told["nodes given up without a fault"] = striker.num_given_up
    print(json.dumps(told, indent=1))


def strike_all(striker: Striker, args: argparse.Namespace, num_replicas: dict[str, int]) -> list[Fault]:
    """One fault each ``args.every`` seconds: of those that are possible the one whose turn is longest ago; at first in
    an order by the seed."""
    names = [name for name in all_faults(args.models) if args.only in name]
    random.Random(args.seed).shuffle(names)
    faults = list[Fault]()
    watcher = Watcher(striker, faults, num_replicas)
    watcher.start()
    end, due = time.monotonic() + 60 * args.minutes, time.monotonic() + 5
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        due += args.every
        name = next(name for name in names if striker.possible(name, num_replicas))
        names.append(names.pop(names.index(name)))
        try:
            faults.append(striker.strike(name))
        except LookupError as error:
            print(error, flush=True)
    watcher.finish()
    for fault in faults:
        if fault.whole is None:
            print(line(fault), flush=True)
    return faults


class Watcher(threading.Thread):
    """Starts nodes anew, and notes when what each fault struck is whole again."""

    def __init__(self, striker: Striker, faults: list[Fault], num_replicas: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._striker = striker
        self._faults = faults
        self._num_replicas = num_replicas
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.5):
            self._striker.look_after()
            for fault in self._faults:
                looked = time.monotonic()
                if not fault.is_seen_through or fault.whole is not None:
                    continue
                if self._striker.has_got_over(fault.name, self._num_replicas):
                    fault.whole = looked
                    print(line(fault), flush=True)

    def finish(self) -> None:
        """Wait until all is whole, at most some minutes."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and any(fault.whole is None for fault in self._faults):
            time.sleep(0.5)
        self._ends.set()
        self.join()


if __name__ == "__main__":
    main()
