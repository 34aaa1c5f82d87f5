"""Three Ray nodes serve the demo models; the loss of a worker with 20 jobs running costs none of them."""

from __future__ import annotations

import concurrent.futures
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.compare import same
from benchmarks.chaos.deployment import write
from benchmarks.chaos.faults import Striker
from benchmarks.chaos.nodes import FAST_NODE_CHECKS, cluster, has_redis
from benchmarks.chaos.traffic import KINDS, VARIANTS, Kind, Outcome, Traffic

pytestmark = [pytest.mark.cluster, pytest.mark.thorough, pytest.mark.timeout(1200)]

NUM_REPLICAS = {"demo-chat": 1, "demo-image": 1, "demo-video": 1}
JOBS = [kind for kind in KINDS if kind.is_job]
NUM_JOBS = 20


@pytest.fixture(scope="module")
def striker() -> Iterator[Striker]:
    """A head and two workers, with one replica of each model."""
    if {name for _, name in socket.if_nameindex()} != {"lo"}:
        pytest.skip("needs a network namespace of its own, as .ci/run makes one")
    if not has_redis():
        pytest.skip("needs Redis: scripts/servers")
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/var/tmp"))  # every node has a /tmp of its own
    with cluster(folder, num_workers=2, settings=FAST_NODE_CHECKS) as nodes:
        nodes.deploy(write(folder / "omni.yaml", folder / "jobs", replicas=1))
        striker = Striker(nodes, seed=0)
        striker.wait_until_whole(NUM_REPLICAS)
        yield striker
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def right(striker: Striker) -> dict[tuple[str, int], bytes]:
    return Traffic(striker.addresses).reference()


@pytest.mark.parametrize("worker", [1, 2])
def test_no_job_is_lost(striker: Striker, right: dict[tuple[str, int], bytes], worker: int) -> None:
    striker.wait_until_whole(NUM_REPLICAS)
    traffic = Traffic(striker.addresses)

    def send(number: int) -> tuple[Kind, int, Outcome]:
        kind, variant = JOBS[number % len(JOBS)], number % VARIANTS
        return kind, variant, traffic.send(kind, variant)

    with concurrent.futures.ThreadPoolExecutor(NUM_JOBS) as pool:
        jobs = [pool.submit(send, number) for number in range(NUM_JOBS)]
        time.sleep(4)
        striker.lose(worker, "killed")
        while not all(job.done() for job in jobs):
            striker.look_after()
            time.sleep(0.5)
    outcomes = [job.result() for job in jobs]
    assert not [error for _, _, outcome in outcomes for error in outcome.errors]
    for kind, variant, outcome in outcomes:
        assert outcome.answer is not None
        assert same(outcome.answer, right[kind.name, variant])
    assert len({job_id for _, _, outcome in outcomes for job_id in outcome.job_ids}) == NUM_JOBS
