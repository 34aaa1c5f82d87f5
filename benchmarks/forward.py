"""Milliseconds of one forward of a transformer, beside stock diffusers and the card's ceiling. Needs a GPU.

    python -m benchmarks.forward FOLDER [--size 1024] [--only REGEX]

Each row is a new transformer with random weights. "Of the ceiling" is the FLOP of its matrix products and attention
over its time, against 8192³ matrix products in bfloat16 of the same run; fp8 can pass it.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from typing import Any

import torch

from benchmarks.alone import Arguments, arguments_of, fresh, made, matmul_tflops, milliseconds
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.plan.autoencoders import autoencoder
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.parts import parts_of
from omni_ray.plan.request import default_request

EAGER, COMPILED = {"compile": {"mode": "none"}}, {"compile": {"mode": "regional"}}
STATIC = {"compile": {"mode": "regional", "dynamic": False}}
FP8 = {"quantization": {"kind": "fp8"}}
FUSED = {"attention": {"fused_qkv": True}}
FUSED_FP8 = {"attention": {"fused_qkv": True, "backend": "fa3_fp8"}}


def graphs(levers: dict[str, Any]) -> dict[str, Any]:
    return levers | {"compile": levers["compile"] | {"cuda_graphs": True}}


STOCK = ("stock, eager", "stock, compiled")
ROWS: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "eager, CUDA graphs": graphs(EAGER),
    "compiled": COMPILED,
    "compiled for one size": STATIC,
    "compiled, CUDA graphs": graphs(COMPILED),
    "compiled, fp8": COMPILED | FP8,
    "compiled, fp8, CUDA graphs": graphs(COMPILED | FP8),
    "compiled, fused QKV, CUDA graphs": graphs(COMPILED | FUSED),
    "compiled, fp8, fused QKV, CUDA graphs": graphs(COMPILED | FP8 | FUSED),
    "compiled, fp8, fused QKV, fp8 attention, CUDA graphs": graphs(COMPILED | FP8 | FUSED_FP8),
    "compiled, fp8, fp8 attention, CUDA graphs": graphs(COMPILED | FP8 | {"attention": {"backend": "fa3_fp8"}}),
    "compiled, int8": COMPILED | {"quantization": {"kind": "int8"}},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--only", default="", help="a regular expression: the rows to measure")
    args = parser.parse_args()
    kind, arguments = arguments_of(args.source, args.size)
    ceiling, tflop = matmul_tflops(), tflop_of(args.source, arguments)
    print(f"{torch.cuda.get_device_name()}: {ceiling:.0f} TFLOP/s in matrix products; {args.source}, {tflop:.1f} TFLOP")
    print("\n| | ms a forward | against stock compiled | of the ceiling | first forward s |\n|---|---|---|---|---|")
    stock = 0.0
    for name in (*STOCK, *ROWS):
        if not re.search(args.only, name):
            continue
        try:
            first_s, ms = measured(kind, arguments, name)
        except ConfigError as error:
            print(f"| {name} | | | | | {error}", flush=True)
        else:
            stock = ms if name == "stock, compiled" else stock
            against = f"{stock / ms:.2f}" if stock else ""
            print(f"| {name} | {ms:.1f} | {against} | {tflop / ms * 1000 / ceiling:.0%} | {first_s:.1f} |", flush=True)


def measured(kind: Any, arguments: Arguments, row: str) -> tuple[float, float]:
    """Seconds of the first forward, and milliseconds of a later one."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    transformer = made(kind, ROWS[row])[0] if row in ROWS else fresh(kind)
    if row == "stock, compiled":
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    start = time.perf_counter()
    transformer(*arguments[0], **arguments[1])
    torch.cuda.synchronize()
    return time.perf_counter() - start, milliseconds(lambda: transformer(*arguments[0], **arguments[1]))


def tflop_of(source: str, arguments: Arguments) -> float:
    """TFLOP of a forward of the default size, as the plan counts them, for the batch of ``arguments``."""
    checkpoint = read_checkpoint(source)
    group = DitGroup(type="dit", name="bench", source=source)
    request = default_request(group, checkpoint, autoencoder({}))
    model: Any = next(part.model for part in parts_of(checkpoint) if part.role == "transformer")
    image, text = request.image_tokens, request.text_tokens
    first = [*arguments[0], *arguments[1].values()][0]  # a tensor, or a list of one for each image
    return len(first) * float(model.linear_flop(image, text) + model.attention_flop(image, text)) / 1e12


if __name__ == "__main__":
    main()
