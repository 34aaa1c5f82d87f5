"""A process that stands still is found and ended by its neighbours, and no other is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from omni_ray.watch import Watch

NEIGHBOUR = "import time; from omni_ray.watch import look_after_neighbours as look; look(); time.sleep(60)"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that bears the title of a rank."""
    with subprocess.Popen(["ray::Rank", "60"], executable="/bin/sleep") as process:
        yield process
        process.kill()


def test_a_stopped_process_is_ended_by_its_neighbour(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) as neighbour:
        sleeper.send_signal(signal.SIGSTOP)
        assert sleeper.wait(20) == -signal.SIGKILL
        assert neighbour.poll() is None
        neighbour.kill()


def test_only_stopped_processes_of_a_server_below_the_same_root(sleeper: subprocess.Popen[bytes]) -> None:
    watch, stranger = Watch(os.getpid()), Watch(sleeper.pid)
    assert watch.stopped() == set()
    with subprocess.Popen(["sleep", "60"]) as other:
        for process in (sleeper, other):
            process.send_signal(signal.SIGSTOP)
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                pass
        assert watch.stopped() == {sleeper.pid}
        assert stranger.stopped() == set()
        other.kill()
