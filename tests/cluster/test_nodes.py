"""A gang over several nodes of a Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]


def test_ranks_on_two_nodes() -> None:
    command = [sys.executable, "-m", "tests.nodes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    first, second, third, fourth = result["spread"]["nodes"]
    assert first == second != third == fourth
    assert result["spread"]["events"][-2:] == ["Media", "Usage"]
    assert "num_nodes = 2 needs 1 of the 2 ranks on each node" in result["packed"]["error"]
    assert result["packed"]["error"].endswith("set num_nodes to 1")
