"""The lane engine against plain diffusers, one device, one process, one run.

    python -m benchmarks.engine FOLDER|demo:image [--dummy] [--compile] [--sizes 256 512 1024] [--steps 12 16 20]

For each size: the same requests one after the other through the plain pipeline, then sent together to the engine, and
together with batch size 1 forced. Prints the ratio of the two times, the forwards of the transformer, and how far the
images are apart (PSNR in dB of 8-bit pixels; `inf` is bit for bit).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from omni_ray.accel.compile import apply_compile
from omni_ray.config.spec import Batching, Compile, DitGroup
from omni_ray.engine.lockstep import Alone, Turn
from omni_ray.messages import Job
from omni_ray.tuning.likeness import psnr
from omni_ray.tuning.run import device_and_dtype, in_a_thread, load, run

BENCH = {"type": "dit", "name": "bench"}


class Counted(Alone):
    """Counts the forwards."""

    num_forwards = 0

    def agree(self, decide: Callable[[], Turn]) -> Turn:
        turn = decide()
        self.num_forwards += bool(turn.run)
        return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 16, 20])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="the least time of so many is taken")
    args = parser.parse_args()
    device, dtype = device_and_dtype()
    pipe = in_a_thread(_load, args)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"\n{type(pipe).__name__} on {name}, {'compiled' if args.compile else 'eager'}, "
        f"{args.requests} requests of {args.steps} steps, {dtype}"
    )
    print(
        f"{'size':>6} {'plain s':>9} {'lanes s':>9} {'ratio':>7} {'forwards':>12} {'PSNR dB':>8} "
        f"{'one by one':>11} {'PSNR dB':>8}"
    )
    for size in args.sizes:
        jobs = [_job(i, size, args.steps[i % len(args.steps)], args.source) for i in range(args.requests)]
        in_a_thread(_plain, pipe, [_short(jobs[0])])
        _lanes(pipe, [_short(job) for job in jobs], Batching(max_num_seqs=16))
        runs = [in_a_thread(_plain, pipe, jobs) for _ in range(args.repeats)]
        plain_s, images, num_plain = min(runs, key=lambda r: r[0])
        lanes_s, joined, num_lanes = min(
            (_lanes(pipe, jobs, Batching(max_num_seqs=16)) for _ in range(args.repeats)), key=lambda r: r[0]
        )
        single_s, single, _ = _lanes(pipe, jobs, Batching(max_num_seqs=16, max_num_batched_tokens=1))
        print(
            f"{size:>6} {plain_s:>9.2f} {lanes_s:>9.2f} {lanes_s / plain_s:>7.3f} {f'{num_lanes} of {num_plain}':>12} "
            f"{psnr(images, joined):>8.1f} {single_s / plain_s:>11.3f} {psnr(images, single):>8.1f}",
            flush=True,
        )


def _load(args: argparse.Namespace) -> Any:
    load_format = "dummy" if args.dummy else "auto"
    pipe = load(DitGroup.model_validate({**BENCH, "source": args.source, "load_format": load_format}))
    apply_compile(pipe, Compile(mode="regional" if args.compile else "none"), device_and_dtype()[0])
    return pipe


def _job(index: int, size: int, steps: int, source: str) -> Job:
    params: dict[str, Any] = {
        "prompt": f"a red circle {index}",
        "height": size,
        "width": size,
        "num_inference_steps": steps,
    }
    if source == "demo:image":
        params |= {"prompt": "a small green triangle left of a large blue square", "max_sequence_length": 32}
    return Job(id=f"job-{index}", model="bench", group="bench", params=params, seed=index)


def _short(job: Job) -> Job:
    return dataclasses.replace(job, id=f"warm-{job.id}", params=job.params | {"num_inference_steps": 2})


def _plain(pipe: Any, jobs: list[Job]) -> tuple[float, list[Any], int]:
    """Seconds, images and forwards of the jobs one after the other."""
    start = time.perf_counter()
    images = [pipe(**job.params, generator=torch.Generator("cpu").manual_seed(job.seed or 0)).images[0] for job in jobs]
    return (
        time.perf_counter() - start,
        [np.asarray(image) for image in images],
        sum(job.params["num_inference_steps"] for job in jobs),
    )


def _lanes(pipe: Any, jobs: list[Job], batching: Batching) -> tuple[float, list[Any], int]:
    """The same for the jobs sent together. Images are taken before they are encoded, as the pipeline gives them."""
    counted = Counted()
    seconds, images, _ = run(pipe, jobs, batching, lockstep=counted)
    return seconds, images, counted.num_forwards


if __name__ == "__main__":
    main()
