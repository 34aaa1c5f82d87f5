"""Quantization on load: which layers, how far the image moves, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.accel import fp8
from omni_ray.accel.apply import Accelerators
from omni_ray.accel.offload import apply_offload
from omni_ray.accel.offload.packed import num_bytes
from omni_ray.accel.parallel.tensor import RowwiseLinear
from omni_ray.accel.quantize import apply_quantization
from omni_ray.config.spec import Batching, DitGroup, DitOffload, DitQuantization
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from tests.lanes import run_lanes
from tests.ranks import CPU, jobs_of, load


def quantized(module: torch.nn.Module) -> list[str]:
    linears = [(path, part) for path, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    return [path for path, linear in linears if type(linear.weight).__name__ == "Int8Tensor"]


@pytest.mark.parametrize("offload", ["none", "model", "layerwise"])
@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "wan"])
def test_int8_draws_nearly_the_same(
    family: str, offload: Any, tiny: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family)[:3]
    wanted, _ = run_lanes(EngineLoop(tiny(family), Batching()), jobs, monkeypatch)
    pipe = load(tiny_folder(family))
    before = num_bytes([pipe.transformer])
    assert apply_quantization(pipe, DitQuantization(kind="int8"), CPU) == []
    assert num_bytes([pipe.transformer]) < 0.75 * before
    accelerators = Accelerators(offload=apply_offload(pipe, DitOffload(kind=offload), CPU))
    loop = EngineLoop(pipe, Batching(), accelerators=accelerators, device=CPU)
    made, _ = run_lanes(loop, jobs, monkeypatch)
    errors = [float(np.abs(made[job.id] - wanted[job.id]).max()) for job in jobs]
    assert 0 < max(errors) < 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_fp8_is_a_byte_a_weight_and_near(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x[0, 0], x[1] = 0, 1000 * x[1]
    wanted = linear(x).float()
    fp8.convert(linear)
    assert linear.weight.dtype.itemsize == 1
    made = linear(x)
    assert made.dtype == torch.bfloat16
    errors = (made.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
    assert 0 < errors.max() < 0.06


def test_fp8_goes_with_linears_whose_outputs_are_summed() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    wanted = linear(x).float()
    linear.__class__, linear.ranks = RowwiseLinear, SimpleNamespace(sum=lambda part: part)
    fp8.convert(linear)
    assert type(linear) is RowwiseLinear
    assert (linear(x).float() - wanted).norm() < 0.06 * wanted.norm()


def test_layers_of_blocks_and_no_others(tiny_folder: Any) -> None:
    pipe = load(tiny_folder("flux"))
    apply_quantization(pipe, DitQuantization(kind="int8", skip=("transformer_blocks.0.*", "*.ff.*")), CPU)
    paths = quantized(pipe.transformer)
    assert paths
    assert all(path.startswith(("transformer_blocks.", "single_transformer_blocks.")) for path in paths)
    assert not any(path.startswith("transformer_blocks.0.") or ".ff." in path for path in paths)


def test_both_experts_unless_one_is_named(tiny_folder: Any) -> None:
    pipe = load(tiny_folder("wan"))
    apply_quantization(pipe, DitQuantization(kind="int8"), CPU)
    assert quantized(pipe.transformer)
    assert quantized(pipe.transformer_2)
    pipe = load(tiny_folder("wan"))
    apply_quantization(pipe, DitQuantization(kind="int8", components=("transformer_2", "text_encoder")), CPU)
    assert not quantized(pipe.transformer)
    assert quantized(pipe.transformer_2)
    assert quantized(pipe.text_encoder)


def test_what_cannot_be_quantized_is_said(tiny_folder: Any) -> None:
    pipe = load(tiny_folder("flux"))
    (warning,) = apply_quantization(pipe, DitQuantization(kind="int8", skip=("*",)), CPU)
    assert warning == "quantization int8: none of the 0 layers of transformer that may be was"
    with pytest.raises(ConfigError, match="FluxPipeline has no transfomer; it has text_encoder, text_encoder_2"):
        apply_quantization(pipe, DitQuantization(kind="int8", components=("transfomer",)), CPU)
    with pytest.raises(ConfigError, match="'fp8' needs a GPU; on a CPU, set kind: int8 or none"):
        apply_quantization(pipe, DitQuantization(kind="fp8"), CPU)
    with pytest.raises(ValueError, match="'int4' needs a GPU, but device is 'cpu'"):
        DitGroup(type="dit", name="m", source="x", device="cpu", quantization=DitQuantization(kind="int4"))
    with pytest.raises(ValueError, match="skip: says nothing with kind 'none'"):
        DitQuantization(skip=("*",))
