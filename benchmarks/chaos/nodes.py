"""A cluster of Ray nodes on this machine, each in namespaces of its own: it has an address, processes and a `/tmp` that
the others do not see, and can be killed, frozen or cut off as a machine can.

Works where `unshare --net --mount --pid` does, inside a network namespace of our own that has no way out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from omni_ray.cli.environment import environment

BRIDGE = "omni-ray"
NETWORK = "10.77.0"
GCS_PORT, DASHBOARD_PORT, REDIS_PORT, HTTP_PORT = 6379, 8265, 6390, 8000
REDIS = f"{NETWORK}.1:{REDIS_PORT}"
BIN = Path(sys.executable).parent
REAPER = "trap : CHLD; while :; do sleep 3600 & wait $!; done"
"""The first process of a node, which takes in those that lost their parent."""

FAST_NODE_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_timeout_ms": "400",
    "RAY_health_check_failure_threshold": "3",
}
"""For Ray's control store, which by default takes half a minute to give a node up that no longer answers."""


@dataclass
class Node:
    """One node, ``index`` from 0, which is the head. ``folder`` holds its `/tmp`."""

    index: int
    folder: Path
    num_cpus: int
    settings: dict[str, str] = field(default_factory=dict)
    first: psutil.Process | None = None
    _holder: subprocess.Popen[bytes] | None = None

    @property
    def ip(self) -> str:
        return f"{NETWORK}.{10 + self.index}"

    @property
    def url(self) -> str:
        return f"http://{self.ip}:{HTTP_PORT}"

    def start(self) -> None:
        """Make the namespaces and start Ray in them."""
        self._holder = _namespaces()
        self.first = _first_of(psutil.Process(self._holder.pid))
        inside, outside = f"in{self.index}", f"out{self.index}"
        sh(f"ip link del {outside} 2>/dev/null; ip link add {outside} type veth peer name {inside}")
        sh(f"ip link set {inside} netns {self.first.pid}")
        sh(f"ip link set {outside} master {BRIDGE} up")
        tmp = self.folder / f"node{self.index}"
        tmp.mkdir(exist_ok=True)
        subprocess.run(
            self.command(
                "sh", "-ec",
                f"mount --bind {tmp} /tmp; ip link set lo up; ip link set {inside} up; "
                f"ip addr add {self.ip}/24 dev {inside}",
            ),
            check=True,
        )  # fmt: skip
        subprocess.run(
            self.command(*self._ray_start()), check=True, stdout=subprocess.DEVNULL, env=self.environment(), timeout=120
        )

    def _ray_start(self) -> list[str]:
        command = [str(BIN / "ray"), "start", f"--node-ip-address={self.ip}", f"--num-cpus={self.num_cpus}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        if self.index:
            return [*command, f"--address={NETWORK}.10:{GCS_PORT}"]
        return [*command, "--head", f"--port={GCS_PORT}", f"--dashboard-host={self.ip}"]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {"RAY_AUTH_MODE": "disabled"} | environment() | self.settings

    def command(self, *words: str) -> list[str]:
        """``words``, to be run in the node."""
        assert self.first is not None
        return ["nsenter", "-t", str(self.first.pid), "-n", "-m", "-p", *words]

    def processes(self) -> list[psutil.Process]:
        """All of the node's, without its first one."""
        return self.first.children(recursive=True) if self.first and self.first.is_running() else []

    def is_up(self) -> bool:
        """Whether Ray runs on it."""
        with contextlib.suppress(psutil.Error):
            return any(process.name() == "raylet" for process in self.processes())
        return True  # one of its processes has just ended

    def kill(self) -> None:
        """End all that runs on the node at once, as when its power fails."""
        if self.first is not None and self.first.is_running():
            self.first.kill()
            self.first.wait(30)
        if self._holder is not None:
            self._holder.wait(30)
        self.first = None

    def freeze(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGSTOP)

    def cut_off(self) -> None:
        """Nothing reaches the node any more, nor leaves it."""
        sh(f"ip link set out{self.index} down")


@dataclass
class Cluster:
    """``nodes[0]`` is the head; it has no CPUs, as in a cluster of KubeRay's, so that models run on the others."""

    folder: Path
    nodes: list[Node]

    def deploy(self, file: Path) -> None:
        """Hand a file to Ray Serve, as KubeRay does; its models load after this."""
        head = self.nodes[0]
        address = f"--address=http://{head.ip}:{DASHBOARD_PORT}"
        command = head.command(str(BIN / "serve"), "deploy", str(file), address)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=head.environment(), timeout=120)


@contextlib.contextmanager
def cluster(
    folder: Path, num_workers: int, num_cpus: int = 2, settings: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """A head and workers that run Ray. Its control store keeps its state in Redis, so that the head may be killed."""
    _make_bridge()
    settings = {"RAY_REDIS_ADDRESS": REDIS} | (settings or {})
    nodes = [Node(index, folder, num_cpus if index else 0, settings) for index in range(num_workers + 1)]
    with (folder / "redis.log").open("w") as log, _redis(log):
        try:
            for node in nodes:
                node.start()
            yield Cluster(folder, nodes)
        finally:
            for node in reversed(nodes):
                node.kill()


@contextlib.contextmanager
def _redis(log: IO[str]) -> Iterator[None]:
    command = [_redis_server(), "--bind", f"{NETWORK}.1", "--port", str(REDIS_PORT)]
    command += ["--save", "", "--appendonly", "no", "--protected-mode", "no"]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=_redis_environment())
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def has_redis() -> bool:
    """Whether Redis is installed, or was unpacked by `scripts/servers`."""
    try:
        ran = subprocess.run([_redis_server(), "--version"], capture_output=True, env=_redis_environment())
    except OSError:
        return False
    return ran.returncode == 0


def _redis_server() -> str:
    return str(next(Path(sys.prefix, "redis").glob("usr/bin/redis-server"), "redis-server"))


def _redis_environment() -> dict[str, str]:
    libraries = next(Path(sys.prefix, "redis").glob("usr/lib/*-linux-gnu"), "")
    return os.environ | {"LD_LIBRARY_PATH": str(libraries)}


def _make_bridge() -> None:
    sh(f"ip link show {BRIDGE} >/dev/null 2>&1 || ip link add {BRIDGE} type bridge")
    sh(f"ip addr replace {NETWORK}.1/24 dev {BRIDGE}; ip link set {BRIDGE} up")


def _namespaces() -> subprocess.Popen[bytes]:
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", REAPER]
    return subprocess.Popen(command)


def _first_of(holder: psutil.Process) -> psutil.Process:
    while not (found := holder.children()):
        time.sleep(0.05)
    while found[0].name() != "bash":  # its namespaces are not complete before it has become what it will be
        time.sleep(0.05)
    return found[0]


def sh(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True)
