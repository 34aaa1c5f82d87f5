"""Parameters computed from configs, against the models themselves, built on torch's meta device; and from headers."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_ray.config import catalog
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import SHAPES, Component, read_checkpoint
from omni_ray.plan.language import language, of_weights
from omni_ray.plan.parts import parts_of
from omni_ray.plan.transformers import transformer
from tests.tiny_ar import build_tiny_ar
from tests.tiny_dit import FAMILIES, build

GIB = 2**30
# diffusers and transformers have no class for it, so its config is checked by what its card says: 80B parameters.
NOT_BUILT = "tencent--HunyuanImage-3.0"


def shipped() -> list[tuple[str, str]]:
    """Every component of the configs that come with the package."""
    folders = sorted(folder for folder in SHAPES.iterdir() if folder.name != NOT_BUILT)
    sources = [folder.name.replace("--", "/") for folder in folders]
    return [(source, part.name) for source in sources for part in read_checkpoint(source).components]


def build_on_meta(component: Component) -> torch.nn.Module:
    cls = getattr(importlib.import_module(component.library), component.cls)
    with torch.device("meta"):
        if component.library == "diffusers":
            return cls.from_config(component.config)
        return cls(cls.config_class.from_dict(component.config))


def num_params(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("source", "name"), shipped())
def test_shipped_configs(source: str, name: str) -> None:
    part = next(part for part in parts_of(read_checkpoint(source)) if part.name == name)
    assert part.model is not None
    assert part.model.num_params == num_params(build_on_meta(part.component))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_pipelines(family: str, tmp_path: Path) -> None:
    """From the headers, and, once the weights are gone, from the configs."""
    pipe = FAMILIES[family]()
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    build(family, tmp_path)
    for part in parts_of(read_checkpoint(str(tmp_path))):
        assert part.component.num_params >= num_params(modules[part.name])
        assert part.num_bytes(2) == 2 * part.component.num_params + part.component.num_packed_bytes
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    for part in parts_of(read_checkpoint(str(tmp_path))):
        assert part.num_bytes(4) == 4 * num_params(modules[part.name]), part.name


def test_headers_of_a_language_model(tmp_path: Path) -> None:
    model = read_checkpoint(str(build_tiny_ar(tmp_path))).components[0]
    known = language(model.config)
    assert known is not None
    assert model.num_params == known.num_params


def test_a_language_model_of_unknown_kind_is_known_by_its_weights(tmp_path: Path) -> None:
    config = build_tiny_ar(tmp_path) / "config.json"
    known = read_checkpoint(str(tmp_path)).components[0]
    config.write_text(config.read_text().replace('"qwen3"', '"acme"'))
    model = of_weights(json.loads(config.read_text()), known.cls, known.num_params)
    assert model
    assert model.num_params == known.num_params
    assert of_weights(known.config, known.cls, 0) is None


def test_a_tensor_parallel_rank_holds_its_part_of_the_blocks() -> None:
    part = next(
        each for each in parts_of(read_checkpoint("black-forest-labs/FLUX.1-dev")) if each.role == "transformer"
    )
    one, two, four = (part.num_bytes(2, tensor) / GIB for tensor in (1, 2, 4))
    assert 0.5 < two / one < 0.52
    assert one - two == pytest.approx(2 * (two - four), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, family in catalog.FAMILIES.items() if family.tensor])
def test_tensor_parallelism_divides_what_the_catalog_divides(name: str) -> None:
    plan, cls = catalog.FAMILIES[name].tensor, getattr(importlib.import_module("diffusers"), name)
    assert plan
    with torch.device("meta"):
        model = cls()
    linears = cls._tp_plan if plan.linears is None else plan.linears
    rows = {pattern for pattern, how in linears.items() if how == "rowwise" or "Rowwise" in type(how).__name__}
    divided = 0
    for module_name, module in model.named_modules():
        for pattern in (*linears, *plan.gathered):
            if re.fullmatch(re.escape(pattern.removesuffix("?")).replace(r"\*", r"\d+"), module_name):
                bias = 0 if module.bias is None or pattern in rows else module.bias.numel()
                divided += module.weight.numel() + bias
    known = transformer({"_class_name": name, **model.config})
    assert known
    assert known.params_per_rank(2) == pytest.approx(num_params(model) - divided / 2, rel=1e-4)


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    """Repositories hold the same weights in two layouts; only what would be loaded is counted."""
    build_tiny_ar(tmp_path)
    once = read_checkpoint(str(tmp_path)).components[0].num_params
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert read_checkpoint(str(tmp_path)).components[0].num_params == once
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index: dict[str, Any] = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_checkpoint(str(tmp_path)).components[0].num_params == once


def test_hunyuan_image_3_has_80b_parameters() -> None:
    part = parts_of(read_checkpoint("tencent/HunyuanImage-3.0"))[0]
    assert part.num_bytes(2) / 2e9 == pytest.approx(80, rel=0.05)


def test_what_is_not_here_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `hf download acme/unheard-of --include"):
        read_checkpoint("acme/unheard-of")
    with pytest.raises(ConfigError, match=r"neither model_index\.json nor config\.json"):
        read_checkpoint(str(tmp_path))


def test_the_hub_cache_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--acme--tiny"
    build_tiny_ar(repository / "snapshots/0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    assert read_checkpoint("acme/tiny").components[0].num_params > 0


def test_a_pipeline_that_is_here_in_part_is_refused(tmp_path: Path) -> None:
    (build("flux", tmp_path) / "text_encoder_2/config.json").unlink()
    with pytest.raises(ConfigError, match=r"text_encoder_2/config\.json cannot be read"):
        read_checkpoint(str(tmp_path))


def test_an_unknown_encoder_without_weights_is_refused(tmp_path: Path) -> None:
    build("flux", tmp_path)
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps({"model_type": "acme"}))
    part = next(each for each in parts_of(read_checkpoint(str(tmp_path))) if each.name == "text_encoder")
    assert part.num_bytes(2) > 0  # its weights tell
    (tmp_path / "text_encoder/model.safetensors").unlink()
    part = next(each for each in parts_of(read_checkpoint(str(tmp_path))) if each.name == "text_encoder")
    with pytest.raises(ConfigError, match="download its"):
        part.num_bytes(2)
