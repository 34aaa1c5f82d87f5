"""What a script of one's own would do: load the pipeline, make images one after the other, save each as PNG.

Called by `benchmarks.overhead`; prints the mean seconds per image last.
"""

from __future__ import annotations

import io
import json
import sys
import time

import torch

from omni_ray.accel.compile import apply_compile
from omni_ray.config.spec import Compile, DitGroup
from omni_ray.tuning.run import device_and_dtype, load

args = json.loads(sys.argv[1])
group = DitGroup(type="dit", name="bench", source=args["source"], load_format="dummy" if args["dummy"] else "auto")
pipe = load(group)
apply_compile(pipe, Compile(mode="regional" if args["compile"] else "none"), device_and_dtype()[0])
width, height = map(int, args["size"].split("x"))


def make(seed: int) -> float:
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(
        prompt=args["prompt"], width=width, height=height, num_inference_steps=args["steps"], generator=generator
    ).images[0]
    image.save(io.BytesIO(), format="PNG", compress_level=1)
    return time.perf_counter() - start


make(10**6)
make(10**6 + 1)
times = [make(seed) for seed in range(args["images"])]
print(sum(times) / len(times))
