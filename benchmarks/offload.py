"""Seconds of a forward of a transformer whose weights live in host memory, beside the least possible. Needs a GPU.

    python -m benchmarks.offload FOLDER [--size 1024] [--gib 4 8 16]

The bound is the larger of the forward with all weights on the device, and the bytes that stream over the PCIe speed of
the same run. diffusers' own group offloading (a block at a time, with a stream) stands beside it.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from benchmarks.alone import arguments_of, made, milliseconds, pcie_gbs
from omni_ray.accel.offload.packed import num_bytes

EAGER = {"compile": {"mode": "none"}, "attention": {"backend": "native"}}
GIB = 2**30


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--gib", type=float, nargs="*", default=[4.0, 8.0, 16.0], help="parts of the blocks to stream")
    args = parser.parse_args()
    gbs = pcie_gbs()
    kind, arguments = arguments_of(args.source, args.size)
    gc.collect()
    torch.cuda.empty_cache()
    transformer, _ = made(kind, EAGER)
    whole = num_bytes([transformer])
    resident_ms, memory = measured(transformer, arguments)
    print(f"{torch.cuda.get_device_name()}, PCIe {gbs:.1f} GB/s, {args.source}: {whole / GIB:.1f} GiB\n")
    print("| | GiB streamed | ms a forward | bound ms | ratio | GiB on the device |\n|---|---|---|---|---|---|")
    print(f"| all on the device | 0 | {resident_ms:.0f} | | | {memory:.1f} |", flush=True)
    for gib in [*args.gib, 0.0]:
        del transformer
        gc.collect()
        torch.cuda.empty_cache()
        levers = EAGER | {"offload": {"kind": "layerwise", "cpu_offload_gb": gib}}
        transformer, accelerators = made(kind, levers, on_host=True)
        transformer(*arguments[0], **arguments[1])
        assert accelerators.offload is not None
        accelerators.offload.take_transfers()
        transformer(*arguments[0], **arguments[1])
        moved = accelerators.offload.take_transfers().num_bytes
        row(f"layer-wise{f', {gib:g} GiB' if gib else ''}", transformer, arguments, moved, gbs, resident_ms)
    del transformer
    gc.collect()
    torch.cuda.empty_cache()
    transformer, _ = made(kind, EAGER, on_host=True)
    apply_group_offloading(
        transformer,
        onload_device=torch.device("cuda"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        non_blocking=True,
    )
    row("diffusers' group offloading", transformer, arguments, whole, gbs, resident_ms)


def row(name: str, transformer: Any, arguments: Any, moved: int, gbs: float, resident_ms: float) -> None:
    ms, memory = measured(transformer, arguments)
    bound = max(resident_ms, moved / gbs / 1e6)
    print(f"| {name} | {moved / GIB:.1f} | {ms:.0f} | {bound:.0f} | {ms / bound:.2f} | {memory:.1f} |", flush=True)


def measured(transformer: Any, arguments: Any) -> tuple[float, float]:
    """Milliseconds of a forward, and GiB of the device that weights and activations took."""
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(lambda: transformer(*arguments[0], **arguments[1]), repeats=3, warm_ups=2)
    return ms, torch.cuda.max_memory_allocated() / GIB


if __name__ == "__main__":
    main()
