"""A transformer by itself, with random weights and the arguments that its pipeline gives it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from omni_ray.accel.apply import Accelerators, accelerate
from omni_ray.accel.weights import default_dtype
from omni_ray.config.spec import DitGroup
from omni_ray.tuning.run import device_and_dtype, load

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Seen(Exception):
    pass


def arguments_of(source: str, size: int) -> tuple[Any, Arguments]:
    """The transformer's class and config, and the arguments of its first forward for an image of ``size`` squared."""
    pipe = load(DitGroup(type="dit", name="bench", source=source, load_format="dummy"))
    found: list[Arguments] = []

    def see(*args: Any, **kwargs: Any) -> None:
        found.append((args, kwargs))
        raise _Seen

    transformer = pipe.transformer
    transformer.forward = see
    with contextlib.suppress(_Seen):
        pipe("a fox", height=size, width=size, num_inference_steps=2)
    return (type(transformer), dict(transformer.config)), found[0]


def made(kind: Any, levers: dict[str, Any], on_host: bool = False) -> tuple[Any, Accelerators]:
    """A new transformer with ``levers`` applied."""
    transformer, device = fresh(kind), device_and_dtype()[0]
    if on_host:
        transformer.to("cpu")
    pipe: Any = SimpleNamespace(
        components={"transformer": transformer}, transformer=transformer, dtype=transformer.dtype
    )
    group = DitGroup.model_validate({"type": "dit", "name": "bench", "source": "x", **levers})
    return transformer, accelerate(pipe, group, device)


def fresh(kind: Any) -> Any:
    """A new transformer with random weights, as diffusers makes it."""
    cls, config = kind
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return cls.from_config(config).eval().requires_grad_(False)


def milliseconds(run: Callable[[], Any], repeats: int = 10, warm_ups: int = 3) -> float:
    """The median of single runs, measured on the device."""
    times = []
    for i in range(warm_ups + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= warm_ups:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def matmul_tflops(n: int = 8192) -> float:
    """What the card does of ``n``³ matrix products in bfloat16."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b) / 1e9


def pcie_gbs(num_bytes: int = 2**30) -> float:
    """GB/s from page-locked host memory to the card."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return num_bytes / milliseconds(lambda: there.copy_(host, non_blocking=True)) / 1e6
