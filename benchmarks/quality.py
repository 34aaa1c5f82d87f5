"""What each lever buys and what it costs: speed, likeness, and the captions of `demo:image` that are still right.

    python -m benchmarks.quality [--captions 100] [--steps 50] [--only REGEX] [--pairs] [--levers '{"cache": …}' ...]

Each setting makes the same held-out captions with the same seeds, eight side by side. Speed-up, PSNR (dB of 8-bit
pixels, the mean over images) and SSIM (8 x 8 windows) are against the run without a lever; "right" is the share of
captions whose image passes the pixel analysis of `omni_ray.demo.check`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from typing import Any

import torch
from PIL import Image

from omni_ray.config.spec import DitGroup
from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from omni_ray.demo.image_model import DEFAULTS
from omni_ray.messages import Job
from omni_ray.tuning.likeness import mean_psnr, ssim
from omni_ray.tuning.measure import Levers, measure
from omni_ray.tuning.run import device_and_dtype
from omni_ray.tuning.tune import BASELINE


def teacache(threshold: float) -> Levers:
    return {"cache": {"kind": "teacache", "threshold": threshold}}


def cache_dit(**options: Any) -> Levers:
    return {"cache": {"kind": "cache_dit", "cache_dit": options}}


EAGER = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.3}
SETTINGS: dict[str, Levers] = {
    **{f"TeaCache {threshold:g}": teacache(threshold) for threshold in (0.2, 0.4)},
    "TeaCache 0.8, 6 in a row": {"cache": {"kind": "teacache", "threshold": 0.8, "max_consecutive_skips": 6}},
    "Cache-DiT 0.08": cache_dit(Fn_compute_blocks=1, residual_diff_threshold=0.08),
    "Cache-DiT 0.3": cache_dit(**EAGER, max_continuous_cached_steps=4),
    "Cache-DiT 0.3, TaylorSeer": cache_dit(**EAGER, max_continuous_cached_steps=4, taylorseer_order=1),
    "Cache-DiT 0.3, TaylorSeer, 8 in a row": cache_dit(**EAGER, max_continuous_cached_steps=8, taylorseer_order=1),
    "int8": {"quantization": {"kind": "int8"}},
    "fp8": {"quantization": {"kind": "fp8"}},
    "model offload": {"offload": {"kind": "model"}},
    "layer-wise offload": {"offload": {"kind": "layerwise"}},
    "compile": {"compile": {"mode": "regional"}},
}
ROWS_BETWEEN = 5
"""Settings between two measurements of the baseline, whose mean the speed-up is against: a machine drifts."""

PAIRED = ("TeaCache 0.4", "Cache-DiT 0.3", "int8", "layer-wise offload", "compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="a regular expression: the settings to measure")
    parser.add_argument("--pairs", action="store_true", help=f"each two of {', '.join(PAIRED)} too")
    parser.add_argument("--levers", type=json.loads, nargs="+", default=[], help="more settings, as blocks of a group")
    args = parser.parse_args()
    wanted = scenes.held_out_scenes(args.captions)
    jobs, group = jobs_of(wanted, args.steps), DitGroup(type="dit", name="bench", source="demo:image")
    measure(group, BASELINE, jobs[:8])  # the first run of a process is slower than all others
    exact = measure(group, BASELINE, jobs)
    device, dtype = device_and_dtype()
    print(f"{args.captions} captions of {args.steps} steps, {device}, {dtype}\n")
    print("| setting | steps skipped | seconds | without | speed-up | PSNR dB | SSIM | right |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| none | 0% | {exact.seconds:.1f} | | 1.00 | | | {right(exact.images, wanted):.0%} |", flush=True)
    before, rest = exact.seconds, list(settings(args).items())
    while rest:
        some, rest = rest[:ROWS_BETWEEN], rest[ROWS_BETWEEN:]
        found = {name: measure(group, BASELINE | levers, jobs) for name, levers in some}
        after = measure(group, BASELINE, jobs).seconds
        for name, each in found.items():
            without, images = (before + after) / 2, each.images
            print(
                f"| {name} | {each.skipped:.0%} | {each.seconds:.1f} | {without:.1f} | {without / each.seconds:.2f} | "
                f"{mean_psnr(exact.images, images):.1f} | {ssim(exact.images, images):.3f} | "
                f"{right(images, wanted):.0%} |",
                flush=True,
            )
        before = after


def settings(args: argparse.Namespace) -> dict[str, Levers]:
    chosen = dict(SETTINGS)
    for one, two in itertools.combinations(PAIRED, 2) if args.pairs else ():
        first, second = SETTINGS[one], SETTINGS[two]
        both = first | second
        if first.keys() & second.keys():  # two caches
            both = {"cache": second["cache"] | first["cache"] | {"kind": "both"}}
        chosen[f"{one} + {two}"] = both
    chosen |= {json.dumps(levers): levers for levers in args.levers}
    cuda = torch.cuda.is_available()
    return {name: levers for name, levers in chosen.items() if re.search(args.only, name) and (cuda or name != "fp8")}


def jobs_of(wanted: list[scenes.Scene], steps: int) -> list[Job]:
    return [
        Job(
            id=str(i),
            model="bench",
            group="bench",
            params={**DEFAULTS, "prompt": scene.caption(), "num_inference_steps": steps},
            seed=i,
        )
        for i, scene in enumerate(wanted)
    ]


def right(images: Any, wanted: list[scenes.Scene]) -> float:
    good = [not reasons(Image.fromarray(image), scene) for image, scene in zip(images, wanted, strict=True)]
    return sum(good) / len(good)


if __name__ == "__main__":
    main()
