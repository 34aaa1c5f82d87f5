"""Bytes that each parallel axis moves in one forward, beside the least possible, and the step time to expect on 8 GPUs.

    python -m benchmarks.traffic

The transformers are full-size but hold nothing (meta tensors), so that this runs anywhere: what is counted are the
collectives that rank 0 of the mesh makes. The least possible is what the method itself has to send: for Ulysses each
token's query, key, value and output once per attention, less what stays; for a ring the other ranks' keys and values;
for tensor parallelism two sums of the activations per block. The step time is the measured forward of one GPU, divided
by the ranks, plus the bytes at the link's rate and a fixed time per collective; nothing overlaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import omni_ray.plan
from omni_ray.accel.parallel import apply_parallel
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.config.spec import DitParallel

SHAPES = Path(omni_ray.plan.__file__).parent / "shapes"
LINKS = {"NVLink": 450e9, "PCIe": 55e9}
COLLECTIVE_S = 20e-6


@dataclass(frozen=True)
class Model:
    """``forward_s`` is the transformer's time on one GPU (H200, compiled): measured, or from its FLOP at their rate."""

    name: str
    cls: str
    folder: str
    forward_s: float
    image_tokens: int
    text_tokens: int
    note: str = ""


MODELS = [
    Model("FLUX.1-dev 1024²", "FluxTransformer2DModel", "black-forest-labs--FLUX.1-dev", 0.134, 4096, 512),
    Model("Qwen-Image 1024²", "QwenImageTransformer2DModel", "Qwen--Qwen-Image", 0.132, 4096, 64),
    Model(
        "Wan2.2-A14B 720p, 81 frames", "WanTransformer3DModel", "Wan-AI--Wan2.2-T2V-A14B-Diffusers", 0.0, 75600, 512,
        "from its FLOP at FLUX.1-dev's 555 TFLOP/s",
    ),
]  # fmt: skip
AXES = [{"ulysses": 8}, {"ring": 8}, {"tensor": 8}, {"tensor": 2, "ulysses": 4}]


@dataclass
class Counted:
    """One dimension of a mesh that is not there: its collectives send nothing, and are counted."""

    size: int
    sent: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    index: int = 0
    group: Any = None

    def _count(self, name: str, num_bytes: float) -> None:
        if self.size > 1:
            self.sent[name] = self.sent.get(name, 0) + num_bytes
            self.calls[name] = self.calls.get(name, 0) + 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self._count("sum", 2 * (self.size - 1) / self.size * x.nbytes)
        return x

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._count("gather", (self.size - 1) * x.nbytes)
        return torch.cat([x] * self.size, dim)

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        self._count("exchange", (self.size - 1) / self.size * x.nbytes)
        return torch.empty_like(x)


class Mesh:
    """What `apply_parallel` asks of a device mesh."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.ranks = {name: Counted(size) for name, size in sizes.items()}
        self.name = ""

    def __getitem__(self, name: str) -> Mesh:
        part = Mesh({})
        part.ranks, part.name = self.ranks, name
        return part

    def size(self) -> int:
        return self.ranks[self.name].size

    def get_local_rank(self) -> int:
        return 0


def main() -> None:
    print("| | axes | MB sent a forward | least possible | ratio | collectives | NVLink ms | PCIe ms | one GPU ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for axes in AXES:
            print(row(model, axes), flush=True)


def row(model: Model, axes: dict[str, int]) -> str:
    transformer, mesh = build(model, axes)
    inputs = INPUTS[model.cls](model, transformer.config)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        transformer(**inputs, return_dict=False)
    sent = sum(sum(ranks.sent.values()) for ranks in mesh.ranks.values())
    calls = sum(sum(ranks.calls.values()) for ranks in mesh.ranks.values())
    alone = model.forward_s or counter.get_total_flops() * 8 / 555e12
    times = [alone / 8 + sent / rate + calls * COLLECTIVE_S for rate in LINKS.values()]
    least = least_bytes(model, transformer, axes)
    label = " x ".join(f"{name} {size}" for name, size in axes.items())
    cells = [model.name, label, f"{sent / 1e6:.0f}", f"{least / 1e6:.0f}", f"{sent / least:.2f}", calls]
    return "| " + " | ".join(map(str, [*cells, *(f"{1e3 * t:.1f}" for t in times), f"{1e3 * alone:.0f}"])) + " |"


def build(model: Model, axes: dict[str, int]) -> tuple[Any, Mesh]:
    """The transformer on the meta device, spread over a mesh of counters."""
    cls = getattr(diffusers, model.cls)
    config = json.loads((SHAPES / model.folder / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        transformer = cls.from_config(config).to(torch.bfloat16).eval()
    parallel = DitParallel(**axes)
    mesh = Mesh({name: getattr(parallel, name) for name in ("cfg", "ring", "ulysses", "tensor")})
    pipe: Any = type("Pipe", (), {"components": {"transformer": transformer}, "transformer": transformer})()
    with patch.object(Ranks, "of", lambda mesh, name: mesh.ranks[name]):
        apply_parallel(pipe, parallel, mesh)  # type: ignore[arg-type]
    return transformer, mesh


def least_bytes(model: Model, transformer: Any, axes: dict[str, int]) -> float:
    """What rank 0 has to send, by the method alone, in bfloat16."""
    config = transformer.config
    width, tokens = config.num_attention_heads * config.attention_head_dim, model.image_tokens
    blocks = config.num_layers + config.get("num_single_layers", 0)
    joint = tokens + (model.text_tokens if model.cls != "WanTransformer3DModel" else 0)
    parts, tensor = axes.get("ulysses", 1) * axes.get("ring", 1), axes.get("tensor", 1)
    shard = 2 * joint / parts * width
    ulysses = 4 * shard / tensor * (1 - 1 / axes.get("ulysses", 1))
    ring = 2 * shard / tensor * (axes.get("ring", 1) - 1)
    sums = 2 * config.num_layers + config.get("num_single_layers", 0)  # a FLUX single block adds its two outputs first
    sums += config.num_layers if model.cls == "WanTransformer3DModel" else 0  # the cross-attention's
    return blocks * (ulysses + ring) + sums * 2 * shard * (1 - 1 / tensor)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def flux_inputs(model: Model, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, model.image_tokens, config.in_channels),
        "encoder_hidden_states": meta(1, model.text_tokens, config.joint_attention_dim),
        "pooled_projections": meta(1, config.pooled_projection_dim),
        "timestep": meta(1),
        "guidance": meta(1),
        "img_ids": meta(model.image_tokens, 3),
        "txt_ids": meta(model.text_tokens, 3),
    }


def qwen_inputs(model: Model, config: Any) -> dict[str, Any]:
    edge = round(model.image_tokens**0.5)
    return {
        "hidden_states": meta(1, model.image_tokens, config.in_channels),
        "encoder_hidden_states": meta(1, model.text_tokens, config.joint_attention_dim),
        "timestep": meta(1),
        "img_shapes": [[(1, edge, edge)]],
    }


def wan_inputs(model: Model, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, config.in_channels, 21, 90, 160),
        "encoder_hidden_states": meta(1, model.text_tokens, config.text_dim),
        "timestep": meta(1),
    }


INPUTS = {
    "FluxTransformer2DModel": flux_inputs,
    "QwenImageTransformer2DModel": qwen_inputs,
    "WanTransformer3DModel": wan_inputs,
}

if __name__ == "__main__":
    main()
