"""A load that triples and falls, on a group that is scaled by its work and on one of a fixed number of replicas.

    python -m benchmarks.scaling [--plot benchmarks/plots/scaling.png]

Run it where nothing else uses Ray, such as in a network namespace of its own. Router, queue, autoscaler and replicas
are Ray Serve's and ours; in place of ranks the replicas have one worker that sleeps for the device seconds of each
step, as this machine has too few cores to give every replica some. Jobs come at random times (Poisson), the same in
both runs. The fixed number is the mean of the scaled run, rounded up.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import ray
from ray import serve

from omni_ray.app import HEALTH
from omni_ray.cli.environment import environment
from omni_ray.config.spec import Autoscaling, DitGroup, OmniSpec
from omni_ray.messages import Capabilities, Event, Job, LoadProgress, StepEvent, Usage
from omni_ray.replica import scaling
from omni_ray.replica.dit import DitReplica
from omni_ray.router import balance
from omni_ray.router.router import Router

matplotlib.use("Agg")

from matplotlib import pyplot

STEPS, STEP_S = 10, 0.4
LOAD_S = 6.0
PHASES = ((90, 0.2), (180, 0.6), (150, 0.2))
"""Seconds, and jobs a second."""

BOUNDS = Autoscaling(
    min_replicas=1,
    max_replicas=6,
    target_outstanding_s=8,
    upscale_delay_s=6,
    downscale_delay_s=30,
    look_back_period_s=12,
)
NAME = "paced"


class PacedGang:
    """Does a step of the job that waits longest, then of the next one; a step takes its device seconds."""

    def __init__(self, group: DitGroup, replica_id: str) -> None:
        self._device = asyncio.Lock()  # fair: first come, first served

    async def load(self) -> AsyncIterator[LoadProgress | Capabilities]:
        await asyncio.sleep(LOAD_S)
        yield Capabilities(pipeline="paced", output="image", fields=frozenset({"prompt", "num_inference_steps"}))

    async def run(self, job: Job) -> AsyncIterator[Event]:
        for step in range(1, STEPS + 1):
            async with self._device:
                await asyncio.sleep(STEP_S)
            yield StepEvent(job_id=job.id, step=step, num_steps=STEPS, seconds=STEP_S)
        cost = {"steps_computed": STEPS, "steps_skipped": 0, "device_s": STEPS * STEP_S, "queue_s": 0.0, "run_s": 0.0}
        yield Usage(job_id=job.id, seed=0, **cost)

    async def join(self) -> None:
        await asyncio.Event().wait()

    def kill(self) -> None: ...


@dataclass
class Run:
    """``series`` is seconds outstanding and replicas, by time; ``waits_s`` is how long each job took beyond its device
    seconds."""

    title: str
    series: list[tuple[float, float, int]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)

    @property
    def mean_replicas(self) -> float:
        return statistics.fmean(num for _, _, num in self.series)

    @property
    def changes(self) -> list[int]:
        nums = [num for _, _, num in self.series]
        return [after - before for before, after in itertools.pairwise(nums) if after != before]

    def p95_s(self) -> float:
        return statistics.quantiles(self.waits_s, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--faster", type=float, default=1.0, help="divide the length of the phases by this")
    args = parser.parse_args()
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "0")  # nothing here speaks HTTP
    os.environ.update(environment())
    ray.init("local", num_cpus=8, log_to_driver=False)
    scaled = asyncio.run(measure("scaled by work", {"autoscaling": BOUNDS}, args.faster))
    num = math.ceil(scaled.mean_replicas)
    fixed = asyncio.run(measure(f"{num} replicas", {"num_replicas": num}, args.faster))
    print("| | replicas, mean | changes | jobs | queue time P50 s | P95 s |")
    print("|---|---|---|---|---|---|")
    for run in (scaled, fixed):
        steps = ", ".join(f"{change:+d}" for change in run.changes) or "none"
        p50 = statistics.median(run.waits_s)
        print(
            f"| {run.title} | {run.mean_replicas:.2f} | {steps} | {len(run.waits_s)} | {p50:.1f} | {run.p95_s():.1f} |"
        )
    if args.plot:
        plot([scaled, fixed], args.plot)
    serve.shutdown()
    ray.shutdown()


async def measure(title: str, replicas: dict[str, Any], faster: float) -> Run:
    """Send the load to a new deployment."""
    group = DitGroup(type="dit", name=NAME, source="demo:image", **replicas)
    spec = OmniSpec(models=[group], jobs={"folder": "/tmp/omni-ray-scaling"})
    handle = await asyncio.to_thread(deploy, spec, group)
    run, began = Run(title), time.monotonic()
    watching = asyncio.create_task(watch(run, handle, began))
    jobs = []
    for number, at in enumerate(arrivals(faster)):
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        jobs.append(asyncio.create_task(send(run, handle, number)))
    await asyncio.gather(*jobs)
    watching.cancel()
    await asyncio.to_thread(serve.delete, "default")
    return run


def deploy(spec: OmniSpec, group: DitGroup) -> Any:
    options: dict[str, Any] = {"num_replicas": group.num_replicas}
    if group.autoscaling:
        options = {"autoscaling_config": scaling.config_of(group)}
    replica = serve.deployment(DitReplica).options(
        name=NAME, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}, **options, **HEALTH,
        request_router_config=balance.request_router_config(),
    )  # fmt: skip
    router = serve.deployment(Router).options(name="Router", max_ongoing_requests=1000, **HEALTH)
    bound = replica.bind(group, functools.partial(PacedGang))
    return serve.run(router.bind(spec, {NAME: bound}, {NAME: NAME}), route_prefix=None)


def arrivals(faster: float) -> Iterator[float]:
    """Seconds from the start, the same every time."""
    dice, begin = random.Random(0), 0.0
    for seconds, rate in PHASES:
        at = begin + dice.expovariate(rate)
        begin += seconds / faster
        while at < begin:
            yield at
            at += dice.expovariate(rate)


async def send(run: Run, handle: Any, number: int) -> None:
    sent = time.monotonic()
    params = {"prompt": "x", "num_inference_steps": STEPS, "height": 256, "width": 256}
    job = Job(id=f"job-{number}-{sent}", model=NAME, group=NAME, params=params)
    async for event in handle.options(stream=True).run.remote(job):
        if isinstance(event, Usage):
            run.waits_s.append(time.monotonic() - sent - event.device_s)


async def watch(run: Run, handle: Any, began: float) -> None:
    while True:
        (status,) = await handle.status.remote()
        run.series.append((time.monotonic() - began, status.outstanding_s, status.replicas.get("RUNNING", 0)))
        await asyncio.sleep(1)


def plot(runs: Sequence[Run], file: Path) -> None:
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, run in zip(axes, runs, strict=True):
        times, outstanding, nums = zip(*run.series, strict=True)
        axis.fill_between(times, outstanding, color="tab:blue", alpha=0.3, label="seconds outstanding")
        axis.set(
            title=f"{run.title}: P95 of the queue time {run.p95_s():.1f} s", ylabel="device seconds", ylim=(0, None)
        )
        replicas = axis.twinx()
        replicas.step(times, nums, where="post", color="tab:red", label="replicas")
        replicas.set(ylabel="replicas", ylim=(0, BOUNDS.max_replicas + 0.5))
        begin = 0
        for seconds, _ in PHASES[:-1]:
            begin += seconds
            axis.axvline(begin, color="grey", linestyle=":")
    axes[-1].set_xlabel("seconds (dotted: the load triples, and falls)")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
