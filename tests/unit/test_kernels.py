"""Attention kernels and compilation: what is chosen, and what is refused with its reason."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

from omni_ray.accel.apply import accelerate
from omni_ray.accel.attention import _race_shape, apply_attention
from omni_ray.accel.compile import apply_compile, is_compiled
from omni_ray.accel.graphs import apply_cuda_graphs
from omni_ray.accel.launches import Launches
from omni_ray.accel.projections import fuse_projections
from omni_ray.config.spec import Attention, Batching, Compile, DitGroup
from omni_ray.engine.loop import EngineLoop
from omni_ray.engine.warm_up import warm_up
from omni_ray.errors import ConfigError
from omni_ray.messages import Capabilities
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.parts import parts_of
from tests.lanes import run_lanes
from tests.ranks import CPU, jobs_of, load

CUDA = torch.device("cuda")


def test_a_kernel_that_runs_draws_the_same(tiny: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of("flux")[:1]
    wanted, _ = run_lanes(EngineLoop(tiny("flux"), Batching()), jobs, monkeypatch)
    pipe = load(tiny_folder("flux"))
    assert apply_attention(pipe, Attention(backend="_native_flash"), CPU, torch.float32) == []
    made, _ = run_lanes(EngineLoop(pipe, Batching()), jobs, monkeypatch)
    assert np.abs(made[jobs[0].id] - wanted[jobs[0].id]).max() < 1e-4


@pytest.mark.parametrize("backend", ["fa3", "flash", "sage", "xformers"])
def test_a_kernel_that_is_not_installed_is_refused(backend: str, tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention.backend '\w+' (cannot be used|does not run)"):
        apply_attention(load(tiny_folder("flux")), Attention(backend=backend), CPU, torch.float32)


def test_a_kernel_that_is_installed_and_does_not_run_is_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"'_native_cudnn' does not run on cpu in torch.float32"):
        apply_attention(load(tiny_folder("flux")), Attention(backend="cudnn"), CPU, torch.float32)


def test_auto_leaves_the_models_own_on_a_cpu(tiny_folder: Any) -> None:
    pipe = load(tiny_folder("flux"))
    apply_attention(pipe, Attention(), CPU, torch.float32)
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend is None


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("black-forest-labs/FLUX.1-dev", (1, 4608, 24, 128)),
        ("black-forest-labs/FLUX.2-dev", (1, 4608, 48, 128)),
        ("Qwen/Qwen-Image", (1, 4608, 24, 128)),
        ("Tongyi-MAI/Z-Image-Turbo", (1, 4608, 30, 128)),
        ("stabilityai/stable-diffusion-3.5-large", (1, 4608, 38, 64)),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (1, 16384, 40, 128)),
    ],
)
def test_kernels_race_at_the_models_own_heads(source: str, shape: tuple[int, ...]) -> None:
    part = next(part for part in parts_of(read_checkpoint(source)) if part.role == "transformer")
    assert _race_shape(part.component.config) == shape


def test_a_u_net_is_taken_for_a_transformer_of_one_kind() -> None:
    assert _race_shape({"attention_head_dim": [5, 10, 20, 20]}) == (1, 4608, 24, 128)


@pytest.mark.parametrize("family", ["flux", "flux2", "wan", "helios"])
def test_fused_projections_draw_the_same(
    family: str, tiny: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family)[:1]
    wanted, _ = run_lanes(EngineLoop(tiny(family), Batching()), jobs, monkeypatch)
    pipe, cache = load(tiny_folder(family)), {"kind": "teacache", "threshold": 1e-9, "coefficients": (1.0, 0.0)}
    group = {"name": "x", "type": "dit", "source": "x", "attention": {"fused_qkv": True}, "cache": cache}
    accelerators = accelerate(pipe, DitGroup.model_validate(group), CPU)
    names = {name.rpartition(".")[2] for name, _ in pipe.transformer.named_modules()}
    assert "to_qkv" in names
    assert not names & {"to_k", "to_v", "add_k_proj"}
    made, _ = run_lanes(EngineLoop(pipe, Batching(), accelerators=accelerators), jobs, monkeypatch)
    assert np.abs(made[jobs[0].id] - wanted[jobs[0].id]).max() < 1e-4


def test_projections_that_cannot_be_fused_are_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"QwenImageTransformer2DModel\) has no projections to fuse"):
        fuse_projections(load(tiny_folder("qwen_image")), Attention(fused_qkv=True))
    pipe = load(tiny_folder("flux"))
    pipe.transformer.is_quantized = True
    with pytest.raises(ConfigError, match="transformer is quantized in its checkpoint"):
        fuse_projections(pipe, Attention(fused_qkv=True))
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 1}
    pipe.register_modules(transformer=LTXVideoTransformer3DModel(**config, caption_channels=16))
    with pytest.raises(ConfigError, match=r"LTXVideoTransformer3DModel\) has no projections to fuse"):
        fuse_projections(pipe, Attention(fused_qkv=True))


def test_blocks_are_compiled_on_gpus_unless_the_spec_says() -> None:
    assert [is_compiled(Compile(), device) for device in (CPU, CUDA)] == [False, True]
    assert is_compiled(Compile(mode="regional"), CPU)
    assert not is_compiled(Compile(mode="none"), CUDA)


def test_what_cannot_be_compiled_is_said(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_folder("flux"))
    monkeypatch.setattr(type(pipe.transformer), "_repeated_blocks", None)
    monkeypatch.setattr("omni_ray.accel.modules.FAMILIES", {})
    (warning,) = apply_compile(pipe, Compile(), CUDA)
    assert warning.startswith("compile auto: transformer (FluxTransformer2DModel) names no repeated blocks")
    with pytest.raises(ConfigError, match="set mode: none"):
        apply_compile(pipe, Compile(mode="regional"), CPU)


def traced(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The pipeline with the blocks of its first transformer compiled, but no code made of their graphs; and the
    compiler's counters from now on."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    traced_only = functools.partial(pipe.transformer.compile_repeated_blocks, backend="eager")
    monkeypatch.setattr(pipe.transformer, "compile_repeated_blocks", traced_only, raising=False)
    if hasattr(pipe, "transformer_2"):
        monkeypatch.setattr(pipe.transformer_2, "compile_repeated_blocks", lambda **_: None)
    apply_compile(pipe, Compile(mode="regional"), CPU)
    return pipe, counters


@pytest.mark.parametrize(("family", "kinds"), [("flux", 2), ("qwen_image", 1), ("z_image", 4), ("wan", 1), ("sd3", 2)])
def test_one_graph_for_each_kind_of_block_whatever_the_sizes(
    family: str, kinds: int, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, counters = traced(load(tiny_folder(family)), monkeypatch)
    one_by_one = Batching(max_num_batched_tokens=1)
    run_lanes(EngineLoop(pipe, one_by_one), jobs_of(family)[:3], monkeypatch)
    assert counters["unique_graphs"] == kinds


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "sd3"])
def test_no_request_waits_for_the_compiler_after_the_warm_up(
    family: str, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, counters = traced(load(tiny_folder(family)), monkeypatch)
    sizes: list[int] = []
    first, *others = jobs_of(family)[:4]
    loop = EngineLoop(pipe, Batching(), on_forward=lambda name, size, *_: sizes.append(size))
    loop.start()
    defaults = {name: value for name, value in first.params.items() if name != "output_type"}
    capabilities = Capabilities(pipeline="", output="image", fields=frozenset(defaults), defaults=defaults)
    warm_up(loop, capabilities, lambda job: dataclasses.replace(job, seed=0, params=defaults | job.params), joins=True)
    graphs, joined = counters["unique_graphs"], max(sizes)
    monkeypatch.setattr(loop, "start", lambda: None)
    run_lanes(loop, [first, dataclasses.replace(first, id="twin"), *others], monkeypatch)
    assert joined > 1
    assert counters["unique_graphs"] == graphs


def test_cuda_graphs_are_of_gpus_and_of_work_that_never_changes(tiny_folder: Any) -> None:
    fields: dict[str, Any] = {"type": "dit", "name": "m", "source": "x"}
    asked = {"cuda_graphs": True}
    with pytest.raises(ConfigError, match=r"compile.cuda_graphs: needs a GPU, and the device is cpu"):
        apply_cuda_graphs(load(tiny_folder("flux")), DitGroup.model_validate(fields | {"compile": asked}), CPU)
    for other, key in (
        ({"cache": {"kind": "teacache"}}, "cache.kind"),
        ({"offload": {"kind": "model"}}, "offload.kind"),
        ({"parallel": {"ulysses": 2}}, "parallel"),
    ):
        assert DitGroup.model_validate(fields | other).against_cuda_graphs == key
        with pytest.raises(ValueError, match=f"cannot go with {key}; remove one of them"):
            DitGroup.model_validate(fields | other | {"compile": asked})


class Mark:
    """A mark in the queue of a device that is ``behind`` or not. Its time is in milliseconds."""

    now, behind = 0.0, False

    def record(self) -> None:
        self.at = Mark.now

    def query(self) -> bool:
        return not Mark.behind

    def elapsed_time(self, end: Mark) -> float:
        return end.at - self.at


def test_only_shapes_that_wait_for_the_host_are_recorded() -> None:
    launches = Launches(Mark)

    def run(shape: str, *milliseconds: float) -> bool:
        for each in milliseconds:
            with launches.forward(shape):
                Mark.now += each
        return launches.keep_waiting(shape)

    assert not launches.have_seen("first")
    assert not run("first", 900, 60)
    assert launches.have_seen("first")
    assert not launches.are_known
    launches.recorded(0.05)
    assert launches.are_known
    assert launches.keep_waiting("first")
    assert not run("compiled just now", 800)
    assert run("compiled just now", 55, 300)
    assert not run("large", 800, 140, 141)
    Mark.behind = True
    assert not run("on its way", 50, 50)
    Mark.behind = False
    assert launches.keep_waiting("on its way")
    launches.forget("on its way")
    assert not launches.have_seen("on its way")


@pytest.mark.thorough
def test_what_the_compiler_made_is_kept(
    tiny: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    jobs = jobs_of("flux")[:1]
    wanted, _ = run_lanes(EngineLoop(tiny("flux"), Batching()), jobs, monkeypatch)
    counters = torch._dynamo.utils.counters["inductor"]
    for start in ("first", "second"):
        torch._dynamo.reset()
        counters.clear()
        pipe = load(tiny_folder("flux"))
        apply_compile(pipe, Compile(mode="regional"), CPU)
        made, _ = run_lanes(EngineLoop(pipe, Batching()), jobs, monkeypatch)
        assert np.abs(made[jobs[0].id] - wanted[jobs[0].id]).max() < 1e-4
        if start == "second":
            assert counters["fxgraph_cache_miss"] == 0
    assert any(tmp_path.iterdir())
