"""FlashAttention 3 as one of diffusers' kernels.

Its own kernels run on Hopper cards (tests/gpu); an operator of the same name, in full precision, stands in for them.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from omni_ray.accel import flash3
from omni_ray.accel.attention import apply_attention
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.sequence import Sequence
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError
from tests.ranks import CPU, load


def made_of(query: Tensor) -> torch.dtype:
    """The dtype of an answer: of 8 bits the kernels make bfloat16."""
    return torch.bfloat16 if query.dtype == torch.float8_e4m3fn else query.dtype


@functools.cache
def define_operator() -> None:
    @torch.library.custom_op("fa3_fwd::_flash_attn_forward", mutates_args=())
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        wide = [x.float() for x in (q, k, v)]
        for x, scale in zip(wide, (q_descale, k_descale, v_descale), strict=True):
            if scale is not None:
                x.mul_(scale[:, None, :, None])
        query, key, value = (x.transpose(1, 2) for x in wide)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2).contiguous().to(made_of(q)), q.new_empty(0, dtype=torch.float32)

    @forward.register_fake
    def _(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape, dtype=made_of(q)), q.new_empty(0, dtype=torch.float32)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    define_operator()
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", ModuleType("fa3_fwd_interface"))
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    flash3.register()


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 50, 4, 16).unbind()
    return query, key, value * torch.tensor([1e-3, 1, 30, 1e4])[:, None]  # every head of another size


def error(made: Tensor, wanted: Tensor) -> float:
    """The worst head's."""
    away, size = ((x.square().sum((0, 1, 3)).sqrt()) for x in (made - wanted, wanted))
    return float((away / size).max())


KERNELS = [("_flash_3", 1e-6), ("fa3_fp8", 0.06)]


def alone() -> ShardedAttention:
    """The only rank of a gang."""
    nobody: Any = None
    sequence = Sequence(Ranks(nobody, 1, 0), Ranks(nobody, 1, 0))
    sequence.lengths = {"x": 50}
    return ShardedAttention(sequence, ("x",))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("sharded", [None, alone()])
@pytest.mark.parametrize(("name", "largest"), KERNELS)
def test_a_kernel_is_one_of_diffusers(
    name: str, largest: float, sharded: ShardedAttention | None, is_compiled: bool
) -> None:
    query, key, value = qkv()
    wanted = dispatch_attention_fn(query, key, value, scale=0.2, backend=AttentionBackendName("native"))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = AttentionBackendName(name)
        out: Tensor = dispatch_attention_fn(query, key, value, scale=0.2, backend=backend, parallel_config=sharded)
        return out

    run = torch.compile(attend, fullgraph=True, backend="eager") if is_compiled else attend
    made = run(query, key, value)
    assert made.dtype == query.dtype
    assert error(made, wanted) < largest


def test_queries_and_keys_out_of_range_are_the_largest_there_is() -> None:
    query, key, value = qkv()
    made = dispatch_attention_fn(query * 1e4, key, value, backend=AttentionBackendName("fa3_fp8"))
    assert made.isfinite().all()


@pytest.mark.parametrize("sharded", [None, alone()])
@pytest.mark.parametrize("name", ["_flash_3", "fa3_fp8"])
def test_a_call_with_a_mask_is_pytorchs(name: str, sharded: ShardedAttention | None) -> None:
    mask = torch.arange(50).expand(2, 1, 1, 50) < torch.tensor([50, 20])[:, None, None, None]
    wanted = dispatch_attention_fn(*qkv(), attn_mask=mask, backend=AttentionBackendName("native"))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = AttentionBackendName(name)
        out: Tensor = dispatch_attention_fn(query, key, value, mask, backend=backend, parallel_config=sharded)
        return out

    for run in (attend, torch.compile(attend, fullgraph=True, backend="eager")):
        assert error(run(*qkv()), wanted) < 1e-6


@pytest.mark.parametrize(("backend", "name"), [("fa3", "_flash_3"), ("fa3_fp8", "fa3_fp8")])
def test_a_transformer_gets_it_and_nothing_else_does(backend: str, name: str, tiny_folder: Any) -> None:
    pipe = load(tiny_folder("flux"))
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    assert apply_attention(pipe, Attention(backend=backend), CPU, torch.float32) == []
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == name
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == before


def test_fp8_is_refused_where_no_norm_bounds_queries_and_keys(tiny_folder: Any) -> None:
    pipe = load(tiny_folder("sd3"))
    config = dict(pipe.transformer.config) | {"qk_norm": None}
    pipe.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    with pytest.raises(ConfigError, match=r"transformer.transformer_blocks.0.attn does not normalize .*; use fa3"):
        apply_attention(pipe, Attention(backend="fa3_fp8"), CPU, torch.float32)


def test_fp8_is_refused_where_no_attention_is_known() -> None:
    with pytest.raises(ConfigError, match="'fa3_fp8': transformer does not normalize"):
        flash3.check_normalized(torch.nn.Linear(2, 2), "transformer")


@pytest.mark.parametrize("backend", ["fa3", "fa3_fp8"])
def test_no_other_card_is_asked(backend: str, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200")
    with pytest.raises(ConfigError, match="FlashAttention 3 needs a Hopper card, and NVIDIA B200 is none; use auto"):
        apply_attention(load(tiny_folder("flux")), Attention(backend=backend), torch.device("cuda"), torch.float32)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch, tiny_folder: Any) -> None:
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    with pytest.raises(ConfigError, match=r"'fa3_fp8' cannot be used: .* pip install fa3-fwd"):
        apply_attention(load(tiny_folder("flux")), Attention(backend="fa3_fp8"), CPU, torch.float32)
