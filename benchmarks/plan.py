"""What `omni-ray plan` says of a pipeline on this machine, beside what it then takes.

    python -m benchmarks.plan FOLDER|demo:image [--dummy] [--compile] [--steps 28]

Loads the pipeline, runs one request of its default size to warm up and one to measure. GiB are those of torch's
allocator; the plan's workspace is the rest of what the device has in use. On a CPU only the weights are compared.
"""

from __future__ import annotations

import argparse
import inspect
import time
from typing import Any

import torch

from omni_ray.accel.apply import accelerate
from omni_ray.accel.offload.packed import num_bytes
from omni_ray.config.spec import DitGroup, OmniSpec
from omni_ray.plan.inventory import local_inventory
from omni_ray.plan.plan import Need, make_plan
from omni_ray.plan.report import report
from omni_ray.tuning.run import device_and_dtype, load

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()
    model = {
        "name": "measured",
        "type": "dit",
        "source": args.source,
        "load_format": "dummy" if args.dummy else "auto",
        "compile": {"mode": "regional" if args.compile else "none"},
        "batching": {"max_num_batched_tokens": 1},
        "defaults": {"num_inference_steps": args.steps},
    }
    plan = make_plan(OmniSpec.model_validate({"models": [model]}), local_inventory())
    print(report(plan))
    group, need = plan.groups[0].group, plan.groups[0].need
    assert isinstance(group, DitGroup)
    assert need is not None, plan.groups[0].unknown
    _measure(group, need)


@torch.no_grad()
def _measure(group: DitGroup, need: Need) -> None:
    device, _ = device_and_dtype()
    pipe = load(group)
    accelerate(pipe, group, device)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    measured = {name: num_bytes([part]) / GIB for name, part in modules.items()}
    _run(pipe, need, 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _run(pipe, need, group.defaults["num_inference_steps"])
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info()
        measured["activations"] = torch.cuda.max_memory_allocated() / GIB - sum(measured.values())
        measured["workspace"] = (whole - free - torch.cuda.memory_reserved()) / GIB
    print(f"\n{'':24}{'planned':>9}{'measured':>10}{'ratio':>7}")
    for item in need.memory.items:
        if item.name in measured:
            _row(f"{item.name}, GiB", item.gib, measured[item.name])
    if device.type == "cuda":
        _row("all, GiB", need.memory.needed_gib, sum(measured.values()))
    if need.estimate:
        _row("one request, s", need.estimate.seconds, seconds)


def _run(pipe: Any, need: Need, steps: int) -> None:
    request = need.request
    assert request is not None
    asked = {"height": request.height, "width": request.width, "num_frames": request.frames}
    takes = inspect.signature(pipe.__call__).parameters
    pipe("a fox", num_inference_steps=steps, **{name: value for name, value in asked.items() if name in takes})
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _row(name: str, planned: float, measured: float) -> None:
    print(f"{name:24}{planned:9.3f}{measured:10.3f}{planned / measured:7.2f}")


if __name__ == "__main__":
    main()
