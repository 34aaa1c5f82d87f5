"""Recorded kernels on a real GPU: every family draws to the bit what it draws without, whatever came before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.accel.apply import accelerate
from omni_ray.config.spec import Batching, DitGroup
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from tests.lanes import run_lanes
from tests.ranks import jobs_of
from tests.tiny_dit import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def draw(family: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    device = torch.device("cuda")
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    compile_ = {"mode": "none", "cuda_graphs": cuda_graphs}
    group = DitGroup.model_validate({"type": "dit", "name": "m", "source": "x", "compile": compile_})
    accelerators = accelerate(pipe, group, device)
    one_by_one = Batching(max_num_seqs=4, max_num_batched_tokens=1)
    loop = EngineLoop(pipe, one_by_one, accelerators=accelerators, device=device)
    made, _ = run_lanes(loop, jobs_of(family)[:5], monkeypatch)
    return pipe, made


NOT_RECORDED = ("hunyuan_image", "helios")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("wan_i2v", *NOT_RECORDED)])
def test_the_same_images(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = draw(family, False, monkeypatch)
    pipe, made = draw(family, True, monkeypatch)
    assert pipe.transformer.call_hooks["cuda_graphs"]._recorded
    assert {job: float(np.abs(made[job] - wanted[job]).max()) for job in wanted} == dict.fromkeys(wanted, 0.0)


@pytest.mark.parametrize("family", NOT_RECORDED)
def test_what_reads_from_the_device_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"compile.cuda_graphs: transformer reads from the device"):
        draw(family, True, monkeypatch)
