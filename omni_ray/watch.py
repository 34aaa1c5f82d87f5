"""Ends processes that stand still: stopped by a signal, a container's freezer or a debugger that was left behind.

Nobody is told when a process stops. Its sockets stay open, its callers wait, and Ray and Ray Serve take half a minute
and more to give it up. The processes of a server that share a node therefore look after each other: they are children
of one raylet, and `/proc` says who of them is stopped. One that is killed is noticed at once by all who wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

INTERVAL_S = 0.25
STOPPED = b"T"
TITLES = (
    b"ray::Rank",
    b"ray::Watcher",
    b"ray::ServeReplica:",
    b"ray::ServeController",
    b"ray::ProxyActor",
    b"ray::HAProxyManager",
    b"VLLM::EngineCore",
)
"""How the command lines begin of those that are looked after, as far as they are relatives."""

logger = logging.getLogger("ray.serve")


def look_after_neighbours() -> None:
    """From now on end every process of this server on this node that is found stopped twice in a row. Linux only."""
    global _watch
    if _watch is None:
        _watch = Watch(os.getppid())
        threading.Thread(target=_watch.run, daemon=True, name="watch").start()


class Watcher:
    """A Ray actor that does nothing else."""

    def __init__(self) -> None:
        look_after_neighbours()


class Watch:
    """``root`` is the process whose descendants are looked after."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._descends: dict[int, bool] = {}
        """Of every process that was there at the last look."""

    def run(self) -> None:
        stopped: set[int] = set()
        while True:
            time.sleep(INTERVAL_S)
            before, stopped = stopped, self.stopped()
            for pid in stopped & before:
                logger.error("process %d is stopped, and is killed: %s", pid, _title(pid)[:80].decode(errors="replace"))
                with contextlib.suppress(OSError):  # it ended meanwhile
                    os.kill(pid, signal.SIGKILL)

    def stopped(self) -> set[int]:
        """Those that stand still now."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        known, self._descends = self._descends, {}
        for pid in pids:
            self._descends[pid] = known[pid] if pid in known else self._is_below_root(pid)
        return {p for p in pids if self._descends[p] and _stat(p)[0] == STOPPED and _title(p).startswith(TITLES)}

    def _is_below_root(self, pid: int) -> bool:
        while pid > 1:
            pid = _stat(pid)[1]
            if pid == self._root:
                return True
        return False


_watch: Watch | None = None


def _stat(pid: int) -> tuple[bytes, int]:
    """State, and parent; of a process that is gone nothing and 0."""
    try:
        fields = Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split(maxsplit=2)
    except OSError:
        return b"", 0
    return fields[0], int(fields[1])


def _title(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""
