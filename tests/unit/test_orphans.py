"""A killed process leaves no child behind."""

from __future__ import annotations

import subprocess
import sys

import psutil

PARENT = """
import subprocess
from omni_ray.orphans import leave_none

leave_none()
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
input()
"""


def test_a_child_of_a_killed_process_ends() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert parent.stdin
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(timeout=10)
