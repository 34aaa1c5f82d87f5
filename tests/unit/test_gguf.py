"""Components from GGUF files: what they draw, what the plan says of them, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from omni_ray.accel.loader import load_pipeline
from omni_ray.config.spec import Batching, DitGroup
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.levers import weights_of
from omni_ray.plan.parts import parts_of
from tests.lanes import run_lanes
from tests.ranks import CPU, jobs_of
from tests.tiny_gguf import write


def group_of(folder: Path, **levers: Any) -> DitGroup:
    return DitGroup.model_validate({"type": "dit", "name": "m", "source": str(folder), "dtype": "float32", **levers})


def load(folder: Path, files: dict[str, Any]) -> Any:
    quantization = {"kind": "gguf", "files": {name: str(file) for name, file in files.items()}}
    group = group_of(folder, quantization=quantization)
    return load_pipeline(folder, torch.float32, CPU, group, lambda *_: None)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "sd3", "wan"])
def test_it_draws_nearly_the_same(
    family: str, tiny: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family)[:2]
    wanted, _ = run_lanes(EngineLoop(tiny(family), Batching()), jobs, monkeypatch)
    pipe = load(tiny_folder(family), {"transformer": write(tiny(family).transformer, tmp_path / "q8_0.gguf")})
    assert {type(part).__name__ for part in pipe.transformer.modules()} >= {"GGUFLinear"}
    made, _ = run_lanes(EngineLoop(pipe, Batching()), jobs, monkeypatch)
    errors = [float(np.abs(made[job.id] - wanted[job.id]).max()) for job in jobs]
    assert 0 < max(errors) < 0.05


def test_the_plan_takes_the_size_of_the_file(tiny: Any, tiny_folder: Any, tmp_path: Path) -> None:
    folder, file = tiny_folder("flux"), write(tiny("flux").transformer, tmp_path / "q8_0.gguf")
    checkpoint = read_checkpoint(str(folder))

    def resident(**levers: Any) -> float:
        weights = weights_of(group_of(folder, **levers), parts_of(checkpoint), 2)
        return next(each.resident for each in weights if each.part.name == "transformer")

    quantization: dict[str, Any] = {"kind": "gguf", "files": {"transformer": str(file)}}
    assert resident(quantization=quantization) == file.stat().st_size < resident()
    quantization["files"] = {"transformer": "/nowhere.gguf"}
    with pytest.raises(ConfigError, match=r"the size of /nowhere\.gguf is not known: No such file"):
        resident(quantization=quantization)


def test_what_cannot_be_loaded_is_refused(
    tiny: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, transformer = tiny_folder("flux"), tiny("flux").transformer
    file = write(transformer, tmp_path / "q8_0.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:1000])
    for files, message in (
        ({"transformer": "/nowhere.gguf"}, r"there is no file /nowhere\.gguf"),
        ({"unet": file}, r"has no unet, but .*transformer"),
        ({"text_encoder": file}, r"diffusers loads no CLIPTextModel from a GGUF file; leave out text_encoder"),
        ({"transformer": broken}, r"broken\.gguf cannot be loaded as FluxTransformer2DModel"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, files)
    lacking = write(tiny("qwen_image").transformer, tmp_path / "lacking.gguf", leave_out="proj_out.weight")
    with pytest.raises(ConfigError, match=r"lacking\.gguf cannot be loaded as QwenImage"):
        load(tiny_folder("qwen_image"), {"transformer": lacking})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf; install it"):
        load(folder, {"transformer": file})


def test_a_library_that_a_checkpoint_needs_is_named(tiny_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_folder("flux"), folder)
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_type": "FP8"}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"transformer cannot be loaded: .*modelopt"):
        load_pipeline(folder, torch.float32, CPU, group_of(folder), lambda *_: None)


@pytest.mark.parametrize(
    ("levers", "message"),
    [
        ({"quantization": {"kind": "gguf"}}, "name a GGUF file for each component"),
        ({"quantization": {"kind": "int8", "files": {"transformer": "a"}}}, "files: says nothing with kind 'int8'"),
        ({"quantization": {"kind": "gguf", "files": {"transformer": "a"}, "skip": ["b"]}}, "skip: says nothing with"),
        ({"offload": {"kind": "model"}}, "'gguf' cannot go with offload.kind"),
        ({"parallel": {"tensor": 2}}, r"'gguf' cannot go with parallel.tensor"),
        ({"load_format": "dummy"}, "'gguf' cannot go with load_format"),
    ],
)
def test_what_does_not_go_together_is_refused(levers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        group_of(Path("x"), **{"quantization": {"kind": "gguf", "files": {"transformer": "a"}}} | levers)
