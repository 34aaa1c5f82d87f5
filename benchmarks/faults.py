"""SIGKILL of a random rank of a gang while 20 jobs run, over and over; how each round ended.

    python -m benchmarks.faults [--rounds 10] [--parallel '{"ulysses": 2}']

Run it where nothing else uses Ray, such as in a network namespace of its own. Prints for each round the jobs that ended
with an image, the seconds until the broken gang's processes were gone and until the first image after the kill, and the
processes and placement groups that are there once all is well again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import random
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from benchmarks import serve_file
from tests.conftest import Server, num_placement_groups, serving

RANK = "ray::Rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--parallel", type=json.loads, default={"ulysses": 2})
    args = parser.parse_args()

    num_ranks = math.prod(args.parallel.values())
    model = {"name": "gang", "type": "dit", "source": "demo:image", "parallel": args.parallel}
    with tempfile.TemporaryDirectory() as folder:
        file = serve_file.write(Path(folder, "gang.yaml"), {"models": [model]})
        with serving(file, Path(folder, "log")) as server:
            num_groups = num_placement_groups()
            print("round   images  gone s  first image s  ranks  placement groups")
            for number in range(1, args.rounds + 1):
                row = run_round(server, args.jobs, num_ranks)
                ranks, groups = len(server.find(RANK, num_ranks)), num_placement_groups()
                print(f"{number:>5} {row} {ranks:>6} {f'{groups} of {num_groups}':>17}", flush=True)


def run_round(server: Server, num_jobs: int, num_ranks: int) -> str:
    """One kill in the middle of the jobs."""
    ranks = server.find(RANK, num_ranks)
    ended: list[tuple[float, int]] = []
    with concurrent.futures.ThreadPoolExecutor(num_jobs) as pool:
        jobs = [pool.submit(draw, server, seed) for seed in range(num_jobs)]
        time.sleep(random.uniform(0.5, 3))
        killed = time.monotonic()
        random.choice(ranks).kill()
        psutil.wait_procs(ranks, timeout=30)
        gone_s = time.monotonic() - killed
        ended = [job.result() for job in jobs]
    first_s = min((at - killed for at, status in ended if status == 200 and at > killed + gone_s), default=float("nan"))
    server.wait_ready()
    good = sum(status == 200 for _, status in ended)
    return f"{f'{good} of {num_jobs}':>8} {gone_s:>7.2f} {first_s:>14.1f}"


def draw(server: Server, seed: int) -> tuple[float, int]:
    """When the request ended, and with which status."""
    body = {"model": "gang", "prompt": "a red circle", "seed": seed}
    status = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300).status_code
    return time.monotonic(), status


if __name__ == "__main__":
    main()
