"""What a cache buys and what it costs: speed, likeness and, for `demo:image`, the captions that are still right.

    python -m benchmarks.quality [--captions 100] [--steps 50] [--thresholds 0.05 0.1 0.2 0.4]

Each setting makes the same held-out captions with the same seeds, eight side by side. Speed-up, PSNR (dB of 8-bit
pixels, the mean over images) and SSIM (8 x 8 windows) are against the run without a cache; "right" is the share of
captions whose image passes the pixel analysis of `omni_ray.demo.check`.
"""

from __future__ import annotations

import argparse
import queue
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from omni_ray.accel.apply import Accelerators
from omni_ray.accel.cache.apply import apply_cache
from omni_ray.accel.loader import load_pipeline, resolve
from omni_ray.config.spec import Batching, Cache, DitGroup
from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from omni_ray.demo.image_model import DEFAULTS
from omni_ray.engine import lane
from omni_ray.engine.loop import EngineLoop
from omni_ray.messages import Failure, Job, Usage
from omni_ray.sources import resolve_source

SOURCE = "demo:image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--max-consecutive-skips", type=int, default=4)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[1.0, 0.0])
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = DitGroup(type="dit", name="bench", source=SOURCE)
    pipe = load_pipeline(resolve(resolve_source(SOURCE)), dtype, device, group, lambda *_: None)
    wanted = scenes.held_out_scenes(args.captions)
    exact, exact_s, _ = draw(pipe, wanted, args.steps, None)
    print(f"{args.captions} captions of {args.steps} steps, {device}, {exact_s:.1f} s without a cache")
    print("| setting | steps skipped | speed-up | PSNR dB | SSIM | right |")
    print("|---|---|---|---|---|---|")
    print(f"| no cache | 0% | 1.00 | | | {right(exact, wanted):.0%} |", flush=True)
    for threshold in args.thresholds:
        cache = Cache(
            kind="teacache",
            threshold=threshold,
            max_consecutive_skips=args.max_consecutive_skips,
            coefficients=tuple(args.coefficients),
        )
        images, seconds, skipped = draw(pipe, wanted, args.steps, cache)
        print(
            f"| TeaCache {threshold:g} | {skipped:.0%} | {exact_s / seconds:.2f} | {psnr(exact, images):.1f} | "
            f"{ssim(exact, images):.3f} | {right(images, wanted):.0%} |",
            flush=True,
        )


def draw(pipe: Any, wanted: list[scenes.Scene], steps: int, cache: Cache | None) -> tuple[Any, float, float]:
    """Images [n, height, width, 3] of 8 bits, seconds for all, and the share of steps skipped."""
    made: dict[str, Any] = {}
    lane.encode_outputs = lambda output, job: iter(made.update({job.id: np.asarray(output.images[0])}) or ())  # type: ignore[assignment]
    loop = EngineLoop(pipe, Batching(max_num_seqs=8), accelerators=Accelerators(*apply_cache(pipe, cache)))
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    jobs = [
        Job(
            id=str(i),
            model="bench",
            group="bench",
            params={**DEFAULTS, "prompt": scene.caption(), "num_inference_steps": steps},
            seed=i,
        )
        for i, scene in enumerate(wanted)
    ]
    loop.start()
    start = time.perf_counter()
    for job in jobs:
        loop.submit(job, lambda event: ended.put(event) if isinstance(event, (Usage, Failure)) else None)
    usages = [ended.get() for _ in jobs]
    seconds = time.perf_counter() - start
    loop.stop()
    if failure := next((each for each in usages if isinstance(each, Failure)), None):
        raise failure.error
    skipped = sum(usage.steps_skipped for usage in usages) / (steps * len(jobs))
    return np.stack([made[job.id] for job in jobs]), seconds, skipped


def right(images: Any, wanted: list[scenes.Scene]) -> float:
    good = [not reasons(Image.fromarray(image), scene) for image, scene in zip(images, wanted, strict=True)]
    return sum(good) / len(good)


def psnr(exact: Any, images: Any) -> float:
    error = ((exact.astype(float) - images.astype(float)) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6))))


def ssim(exact: Any, images: Any) -> float:
    """Mean structural similarity of grey values (https://ieeexplore.ieee.org/document/1284395), flat windows."""
    x, y = (torch.from_numpy(each).float().mean(-1)[:, None] for each in (exact, images))

    def mean(z: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(z, 8, stride=4)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


if __name__ == "__main__":
    main()
