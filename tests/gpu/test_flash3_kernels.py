"""FlashAttention 3 on a Hopper card: what its kernels compute beside PyTorch's, in bfloat16 and in fp8."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from omni_ray.accel import flash3
from omni_ray.accel.apply import accelerate
from omni_ray.config.spec import DitGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
    pytest.mark.skipif(importlib.util.find_spec("fa3_fwd") is None, reason="needs fa3-fwd"),
]

LARGEST_ERROR = {"_flash_3": 0.01, flash3.FP8: 0.1}
CUDA = torch.device("cuda")


def error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("backend", LARGEST_ERROR)
@pytest.mark.parametrize("shape", [(1, 4608, 24, 128), (2, 333, 4, 64)])
def test_a_kernel(backend: str, shape: tuple[int, ...]) -> None:
    flash3.register()
    torch.manual_seed(0)
    q, k, v = torch.randn((3, *shape), device=CUDA, dtype=torch.bfloat16)
    v = v * torch.logspace(-3, 3, shape[2], device=CUDA, dtype=v.dtype).unsqueeze(1)  # every head of another size
    wanted = dispatch_attention_fn(q, k, v, backend=AttentionBackendName("native"))
    made = dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend))
    assert max(error(made[:, :, i], wanted[:, :, i]) for i in range(shape[2])) < LARGEST_ERROR[backend]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["fa3", flash3.FP8])
def test_compiled_blocks_of_a_transformer(backend: str) -> None:
    torch.manual_seed(0)
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4, "joint_attention_dim": 64}
    config |= {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "guidance_embeds": True}
    with CUDA:
        transformer = FluxTransformer2DModel(**config, pooled_projection_dim=64).to(torch.bfloat16).eval()
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(2, 1024, 64, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(2, 77, 64, dtype=torch.bfloat16),
            "pooled_projections": torch.randn(2, 64, dtype=torch.bfloat16),
            "timestep": torch.tensor([0.5, 0.5]),
            "guidance": torch.tensor([3.5, 3.5]),
            "img_ids": torch.zeros(1024, 3),
            "txt_ids": torch.zeros(77, 3),
        }
    wanted = transformer(**inputs).sample
    pipe: Any = SimpleNamespace(components={"transformer": transformer}, transformer=transformer, dtype=torch.bfloat16)
    levers = {"attention": {"backend": backend}, "compile": {"mode": "regional"}}
    accelerate(pipe, DitGroup.model_validate({"type": "dit", "name": "m", "source": "x", **levers}), CUDA)
    assert error(transformer(**inputs).sample, wanted) < 0.05
