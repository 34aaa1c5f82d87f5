"""Two experts that take turns on a real GPU: its allocator never holds both, and weights are copied one way only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from omni_ray.accel.apply import accelerate
from omni_ray.accel.offload.components import Components
from omni_ray.accel.offload.packed import num_bytes
from omni_ray.config.spec import Batching, DitGroup
from omni_ray.engine.loop import EngineLoop
from tests.lanes import run_lanes, usage
from tests.ranks import jobs_of
from tests.tiny_dit import wan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CACHE = {"kind": "teacache", "threshold": 1e9, "max_consecutive_skips": 1, "coefficients": (1.0, 0.0)}


def pipeline() -> Any:
    """Wan2.2 with two experts of about 100 MiB, beside which all else is small."""
    torch.manual_seed(0)
    pipe = wan()
    for name in ("transformer", "transformer_2"):
        config = dict(pipe.components[name].config) | {"num_layers": 12, "ffn_dim": 8192, "num_attention_heads": 16}
        expert = WanTransformer3DModel.from_config(config).eval().requires_grad_(False)
        pipe.register_modules(**{name: expert})
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def serve(offload: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    device, pipe = torch.device("cuda"), pipeline()
    group = DitGroup.model_validate(
        {
            "type": "dit",
            "name": "m",
            "source": "x",
            "offload": {"kind": offload},
            "cache": CACHE,
            "compile": {"mode": "none"},
        }
    )
    if offload == "none":
        pipe.to(device)
    accelerators = accelerate(pipe, group, device)
    expert = num_bytes([pipe.transformer])
    loop = EngineLoop(pipe, Batching(max_num_seqs=4), accelerators=accelerators, device=device)
    return expert, *run_lanes(loop, jobs_of("wan")[:4], monkeypatch)


def test_never_both_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted, _ = serve("none", monkeypatch)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    held: list[int] = []
    need = Components.need

    def watched(self: Components, name: str) -> None:
        need(self, name)
        held.append(torch.cuda.memory_allocated() - before)

    monkeypatch.setattr(Components, "need", watched)
    expert, made, events = serve("sequential", monkeypatch)
    assert expert > 50 * 2**20
    assert expert < max(held) < 1.5 * expert
    for job_id, image in wanted.items():
        assert np.abs(made[job_id] - image).max() < 1e-2
    costs = [usage(each) for each in events.values()]
    assert sum(cost.steps_skipped for cost in costs) > 0
    assert sum(cost.offload_paid_s for cost in costs) > 0
    assert all(cost.peak_memory_gib > 0 for cost in costs)


def test_streaming_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted, _ = serve("none", monkeypatch)
    _, made, events = serve("layerwise", monkeypatch)
    for job_id, image in wanted.items():
        assert np.abs(made[job_id] - image).max() < 1e-2
    assert sum(usage(each).offload_hidden_s for each in events.values()) > 0
