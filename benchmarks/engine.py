"""The lane engine against plain diffusers, one device, one process, one run.

    python -m benchmarks.engine FOLDER|demo:image [--dummy] [--compile] [--sizes 256 512 1024] [--steps 12 16 20]

For each size: the same requests one after the other through the plain pipeline, then sent together to the engine, and
together with batch size 1 forced. Prints the ratio of the two times, the forwards of the transformer, and how far the
images are apart (PSNR in dB of 8-bit pixels; `inf` is bit for bit).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from omni_ray.accel.compile import apply_compile
from omni_ray.accel.loader import load_pipeline, resolve
from omni_ray.config.spec import Batching, Compile, DitGroup
from omni_ray.engine import lane
from omni_ray.engine.lockstep import Alone, Turn
from omni_ray.engine.loop import EngineLoop
from omni_ray.messages import Failure, Job, Usage
from omni_ray.sources import resolve_source


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = _in_a_thread(_load, args, device, dtype)
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
        _in_a_thread(_plain, pipe, [_short(jobs[0])])
        _lanes(pipe, [_short(job) for job in jobs], Batching(max_num_seqs=16))
        runs = [_in_a_thread(_plain, pipe, jobs) for _ in range(args.repeats)]
        plain_s, images, num_plain = min(runs, key=lambda r: r[0])
        lanes_s, joined, num_lanes = min(
            (_lanes(pipe, jobs, Batching(max_num_seqs=16)) for _ in range(args.repeats)), key=lambda r: r[0]
        )
        single_s, single, _ = _lanes(pipe, jobs, Batching(max_num_seqs=16, max_num_batched_tokens=1))
        print(
            f"{size:>6} {plain_s:>9.2f} {lanes_s:>9.2f} {lanes_s / plain_s:>7.3f} {f'{num_lanes} of {num_plain}':>12} "
            f"{_psnr(images, joined):>8.1f} {single_s / plain_s:>11.3f} {_psnr(images, single):>8.1f}",
            flush=True,
        )


def _in_a_thread(work: Callable[..., Any], *args: Any) -> Any:
    """Run ``work`` in a thread that ends, so that its OpenMP pool is gone before another thread is measured."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work, *args).result()


def _load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    group = DitGroup(type="dit", name="bench", source=args.source, load_format="dummy" if args.dummy else "auto")
    pipe = load_pipeline(resolve(resolve_source(args.source)), dtype, device, group, lambda *_: None)
    pipe.set_progress_bar_config(disable=True)
    apply_compile(pipe, Compile(mode="regional" if args.compile else "none"))
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
    images: dict[str, Any] = {}
    lane.encode_outputs = lambda output, job: iter(images.update({job.id: np.asarray(output.images[0])}) or ())  # type: ignore[assignment]
    counted = Counted()
    loop, ended = EngineLoop(pipe, batching, counted), queue.SimpleQueue[Any]()
    loop.start()
    start = time.perf_counter()
    for job in jobs:
        loop.submit(job, lambda event: ended.put(event) if isinstance(event, (Usage, Failure)) else None)
    for _ in jobs:
        if isinstance(event := ended.get(), Failure):
            raise event.error
    seconds = time.perf_counter() - start
    loop.stop()
    return seconds, [images[job.id] for job in jobs], counted.num_forwards


def _psnr(first: list[Any], second: list[Any]) -> float:
    error = float(
        np.mean([np.mean((a.astype(float) - b.astype(float)) ** 2) for a, b in zip(first, second, strict=True)])
    )
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


if __name__ == "__main__":
    main()
