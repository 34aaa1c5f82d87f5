"""Chat, image and video traffic on a head and two workers, while processes and nodes are killed, frozen and cut off.

    unshare --net sh -c 'ip link set lo up; exec .venv/bin/python -m benchmarks.chaos --minutes 20'

The nodes are namespaces of this machine (`nodes`). Every request has one right answer, known from before the first
fault. Prints a line per fault, then what the clients saw.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.compare import same
from benchmarks.chaos.deployment import NAMES, write
from benchmarks.chaos.faults import Fault, Striker, all_faults
from benchmarks.chaos.nodes import FAST_NODE_CHECKS, Cluster, cluster
from benchmarks.chaos.traffic import Outcome, Traffic


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
    print("fault                       in flight  noticed s  whole s", flush=True)
    traffic.start()
    began = time.monotonic()
    faults = strike_all(striker, traffic, args, num_replicas)
    traffic.stop()
    striker.wait_until_whole(num_replicas)
    told = summary(traffic.outcomes, right, faults, time.monotonic() - began)
    told["nodes given up without a fault"] = striker.num_given_up
    print(json.dumps(told, indent=1))


def strike_all(
    striker: Striker, traffic: Traffic, args: argparse.Namespace, num_replicas: dict[str, int]
) -> list[Fault]:
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
        in_flight = len(traffic.running)
        try:
            fault = striker.strike(name)
        except LookupError as error:
            print(error, flush=True)
            continue
        fault.in_flight = in_flight
        faults.append(fault)
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


def line(fault: Fault) -> str:
    def after(moment: float | None) -> str:
        return "-" if moment is None else f"{moment - fault.at:.1f}"

    return f"{fault.name:<27} {fault.in_flight:>9} {after(fault.noticed):>10} {after(fault.whole):>8}"


def seconds_of(faults: Sequence[Fault]) -> dict[str, str]:
    """By fault: how often, and the median and the longest time until it was noticed, and until all was whole."""
    told = {}
    for name in sorted({fault.name for fault in faults}):
        of_kind = [fault for fault in faults if fault.name == name]
        moments = {
            "noticed": [fault.noticed - fault.at for fault in of_kind if fault.noticed is not None],
            "whole": [fault.whole - fault.at for fault in of_kind if fault.whole is not None],
        }
        words = [
            f"{what} {statistics.median(times):.1f} (longest {max(times):.1f})"
            for what, times in moments.items()
            if times
        ]
        told[name] = ", ".join([f"{len(of_kind)} times", *words])
    return told


def summary(
    outcomes: Sequence[Outcome], right: dict[tuple[str, int], bytes], faults: Sequence[Fault], seconds: float
) -> dict[str, object]:
    """What the clients saw."""
    answered = [each for each in outcomes if each.answer is not None]
    errors = Counter(error for each in outcomes for error in each.errors)
    wrong = [each for each in answered if not same(each.answer, right[each.kind.name, each.variant])]
    jobs = [each.job_id for each in answered if each.job_id]
    return {
        "seconds": round(seconds),
        "faults": seconds_of(faults),
        "requests": dict(Counter(each.kind.name for each in outcomes)),
        "unanswered": len(outcomes) - len(answered),
        "errors": dict(errors),
        "lost connections": sum(each.lost_connections for each in outcomes),
        "broken streams": sum(each.broken_streams for each in outcomes),
        "refused and sent again": sum(each.refusals for each in outcomes),
        "other answers than without faults": dict(Counter(each.kind.name for each in wrong)),
        "jobs of one request": round(len(set(jobs)) / max(len(jobs), 1), 3),
        "steps computed again": sum(each.steps_again for each in outcomes),
        "slowest s": {
            name: round(max(each.ended - each.started for each in outcomes if each.kind.name == name), 1)
            for name in sorted({each.kind.name for each in outcomes})
        },
    }


if __name__ == "__main__":
    main()
