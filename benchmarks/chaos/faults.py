"""The faults: what is struck, how, and when it is noticed and made good."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.chaos.nodes import DASHBOARD_PORT, Cluster, Node
from benchmarks.chaos.ray_state import RayState

RESTART_AFTER_S = 8.0
"""A machine that failed is back after this, as a pod that Kubernetes starts anew would be."""

START_S = 600.0
"""So long replicas may take to be there, all of them."""

SERVE_KNOWS_S = 5.0
"""Until then Ray Serve may count what is gone as running."""

PROCESSES = {
    "rank": "ray::Rank",
    "image replica": "ray::ServeReplica:omni:demo-image",
    "chat replica": "ray::ServeReplica:omni:demo-chat",
    "chat engine": "VLLM::EngineCore",
    "router": "ray::ServeReplica:omni:Router",
    "ingress": "ray::ServeReplica:omni:Api",
    "controller": "ray::ServeController",
}
BLOWS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
GROUPS = {
    "rank": ("demo-image", "demo-video"),
    "image replica": ("demo-image",),
    "chat replica": ("demo-chat",),
    "chat engine": ("demo-chat",),
}
"""Which groups a fault strikes, or one of them."""

NODE_FAULTS = ("worker killed", "worker frozen", "worker cut off", "head killed", "head frozen")
CONTROLLER_FAULTS = ("controller killed", "controller frozen")
"""A controller that starts anew ends the replicas that are still loading, so that these have to begin again."""


@dataclass
class Fault:
    """One fault. Times are monotonic; those that did not come to be are None."""

    name: str
    at: float = field(default_factory=time.monotonic)
    noticed: float | None = None
    """When a frozen process was ended, or a node given up, by the server itself; when Ray counted a killed process as
    dead, or ended the replica of a killed engine."""

    whole: float | None = None
    """When the struck group had as many replicas as before; of a node, every group."""

    is_seen_through: bool = False
    """Whether ``noticed`` is final, and Ray Serve knows too."""


def all_faults(models: Sequence[str]) -> list[str]:
    """What can be struck where these models are served."""
    processes = [name for name in PROCESSES if set(GROUPS.get(name, models)) & set(models)]
    return [f"{process} {blow}" for process in processes for blow in BLOWS] + list(NODE_FAULTS)


class Striker:
    """Strikes a cluster, and looks after it as Kubernetes does: a node that died is started anew."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._ray = RayState(f"http://{cluster.nodes[0].ip}:{DASHBOARD_PORT}")
        self._dice = random.Random(seed)
        self._down: dict[int, float] = {}
        self.num_given_up = 0
        """Nodes that Ray gave up though nobody had struck them: with too few cores, their answers come too late."""

    def possible(self, name: str, num_replicas: dict[str, int]) -> bool:
        """Two of each can lose one: what would strike a group that has not got over the last blow has to wait, and so
        has what takes a node or the controller away while one of all is missing."""
        if name in NODE_FAULTS + CONTROLLER_FAULTS:
            return self.is_whole(num_replicas)
        return self._are_full(name, self._running() or {}, num_replicas)

    def strike(self, name: str) -> Fault:
        """:raises LookupError: there is nothing of the kind now, or Ray does not answer."""
        if name in NODE_FAULTS:
            return self._strike_node(name)
        process, _, blow = name.rpartition(" ")
        found = self._find(PROCESSES[process])
        if not found:
            raise LookupError(f"no {process} now")
        node, victim = self._dice.choice(found)
        try:
            node_id, pid, parent = self._ray.node_id(node.ip), _pid_in_node(victim), victim.parent() or victim
        except (httpx.HTTPError, OSError) as error:
            raise LookupError(f"{name}: {error}") from error
        fault = Fault(name)
        victim.send_signal(BLOWS[blow])
        if blow == "frozen":
            return _notice(fault, lambda: _end_of(victim))
        if process == "chat engine":
            return _notice(fault, lambda: _end_of(parent))
        return _notice(fault, lambda: _when(lambda: self._ray.has_given_up_actor(node_id, pid)))

    def _strike_node(self, name: str) -> Fault:
        who, _, how = name.partition(" ")
        return self.lose(0 if who == "head" else self._dice.randrange(1, len(self._cluster.nodes)), how)

    def lose(self, index: int, how: str) -> Fault:
        """``how`` is killed, frozen, or cut off."""
        node = self._cluster.nodes[index]
        self._down[index] = time.monotonic()
        fault = Fault(f"{'worker' if index else 'head'} {how}")
        {"killed": node.kill, "frozen": node.freeze, "cut off": node.cut_off}[how]()
        # Nobody keeps count of the head.
        return _notice(fault, lambda: _when(lambda: self._ray.has_given_up_node(node.ip)) if index else None)

    def _find(self, title: str) -> list[tuple[Node, psutil.Process]]:
        found = []
        for node in self._cluster.nodes:
            for process in node.processes():
                try:
                    if " ".join(process.cmdline()).startswith(title) and process.status() != psutil.STATUS_STOPPED:
                        found.append((node, process))
                except psutil.Error:
                    continue
        return found

    def replicas(self) -> set[int]:
        """The processes of all models' replicas."""
        return {process.pid for _, process in self._find("ray::ServeReplica:omni:demo-")}

    def look_after(self) -> None:
        """Start the nodes anew that have been down for a while, whether they were struck or gave up by themselves."""
        for node in self._cluster.nodes:
            if node.index not in self._down and not node.is_up():
                self._down[node.index] = time.monotonic()
                self.num_given_up += 1
        for index, since in list(self._down.items()):
            if time.monotonic() - since > RESTART_AFTER_S:
                node = self._cluster.nodes[index]
                node.kill()
                node.start()
                del self._down[index]

    def addresses(self) -> list[str]:
        """Of the workers that are up, as a load balancer knows them."""
        return [node.url for node in self._cluster.nodes[1:] if node.index not in self._down]

    def is_whole(self, num_replicas: dict[str, int]) -> bool:
        """Whether every node is up, and of every group so many replicas as there should be."""
        if self._down:
            return False
        return self._running() == num_replicas

    def has_got_over(self, name: str, num_replicas: dict[str, int]) -> bool:
        """Whether the groups that this fault strikes have all replicas again (of a node: all groups, and the node); of
        what is in no group, whether the server answers."""
        if name in NODE_FAULTS:
            return self.is_whole(num_replicas)
        running = self._running()
        return running is not None and self._are_full(name, running, num_replicas)

    @staticmethod
    def _are_full(name: str, running: dict[str, int], num_replicas: dict[str, int]) -> bool:
        groups = set(GROUPS.get(name.rpartition(" ")[0], ())) & num_replicas.keys()
        return all(running.get(group) == num_replicas[group] for group in groups)

    def wait_until_whole(self, num_replicas: dict[str, int]) -> None:
        """:raises SystemExit: it takes too long."""
        deadline = time.monotonic() + START_S
        while not self.is_whole(num_replicas):
            if time.monotonic() > deadline:
                raise SystemExit(f"not all replicas run after {START_S:.0f} s: {self._told()}")
            self.look_after()
            time.sleep(0.5)

    def _told(self) -> str:
        try:
            return httpx.get(f"{self.addresses()[0]}/ready", timeout=5, trust_env=False).text
        except (httpx.HTTPError, IndexError) as error:
            return str(error)

    def _running(self) -> dict[str, int] | None:
        """Replicas that run, by group, as the server tells it; groups with others that start or stop are left out.
        None where it does not answer."""
        for address in self.addresses():
            try:
                groups = httpx.get(f"{address}/ready", timeout=3, trust_env=False).json()["groups"]
            except (httpx.HTTPError, ValueError, KeyError):
                continue
            return {g["group"]: g["replicas"]["RUNNING"] for g in groups if g["replicas"].keys() == {"RUNNING"}}
        return None


def _notice(fault: Fault, wait: Callable[[], float | None]) -> Fault:
    """Let ``wait`` find out when the fault is noticed, in a thread of its own."""

    def see() -> None:
        fault.noticed = wait()
        time.sleep(SERVE_KNOWS_S)
        fault.is_seen_through = True

    threading.Thread(target=see, daemon=True).start()
    return fault


def _pid_in_node(process: psutil.Process) -> int:
    """The number that the process has in its node's namespace."""
    (line,) = [
        line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("NSpid:")
    ]
    return int(line.split()[-1])


def _when(is_so: Callable[[], bool], timeout_s: float = 15) -> float | None:
    """When it was asked for the first time that it is so."""
    deadline = time.monotonic() + timeout_s
    while (asked := time.monotonic()) < deadline:
        if is_so():
            return asked
        time.sleep(0.1)
    return None


def _end_of(process: psutil.Process) -> float | None:
    try:
        process.wait(30)
    except psutil.TimeoutExpired:
        return None
    except psutil.Error:
        pass
    return time.monotonic()
