"""Weights that are read in parallel equal those of `from_pretrained` bit for bit, whole and in parts."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from omni_ray.accel import loader, reader, weights
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel import apply_parallel, build_mesh
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.reader import Options, Part, Target
from omni_ray.config.spec import DitGroup, DitParallel
from omni_ray.errors import ConfigError
from tests.tiny_dit import FAMILIES, build

CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)
DEVICES = pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
WITH_TENSOR = [family for family in FAMILIES if family not in ("wan_i2v", "hunyuan_image", "helios")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            folders[family] = build(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return of


def components(folder: Path) -> Iterator[tuple[Any, Path]]:
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if isinstance(entry, list) and entry[0] == "diffusers" and (folder / name / "config.json").is_file():
            yield getattr(diffusers, entry[1]), folder / name


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(model: Any, wanted: Any, device: torch.device = CPU) -> None:
    """``model`` on ``device`` equals ``wanted``, which is on the CPU."""
    found, expected = tensors(model), tensors(wanted)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name].cpu(), tensor), name
    assert {tensor.device.type for tensor in found.values()} == {device.type}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@DEVICES
def test_every_family(device: torch.device, family: str, dtype: torch.dtype, checkpoint: Any) -> None:
    for cls, folder in components(checkpoint(family)):
        wanted = cls.from_pretrained(folder, dtype=dtype)
        model = weights.load_model(cls, folder, dtype, device)
        assert_same(model, wanted, device)
        assert dict(model.config) == dict(wanted.config)
        assert not model.training


def test_sharded_files_of_another_dtype(checkpoint: Any, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(checkpoint("flux") / "transformer", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    wanted = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(weights.load_model(FluxTransformer2DModel, tmp_path, torch.float32, CPU), wanted)


@pytest.fixture
def flux(checkpoint: Any, tmp_path: Path) -> Path:
    """A folder with a transformer, to be spoilt."""
    FluxTransformer2DModel.from_pretrained(checkpoint("flux") / "transformer").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / weights.FILE)
    change(state)
    save_file(state, folder / weights.FILE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("proj_out.bias"), r"the files lack proj_out\.bias"),
        (lambda state: state.update(extra=torch.zeros(3)), "the model has no extra"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(3)}), r"another shape of proj_out\.bias"),
    ],
)
def test_other_keys_are_told(change: Any, reason: str, flux: Path) -> None:
    rewrite(flux, change)
    with pytest.raises(weights.Unsuitable, match=reason):
        weights.load_model(FluxTransformer2DModel, flux, torch.float32, CPU)


def test_other_files_are_told(flux: Path) -> None:
    config = flux / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(weights.Unsuitable, match="quantized"):
        weights.empty_model(FluxTransformer2DModel, flux, torch.float32)
    (flux / weights.FILE).unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    with pytest.raises(weights.Unsuitable, match="it has no diffusion_pytorch_model"):
        weights.empty_model(FluxTransformer2DModel, flux, torch.float32)


def test_an_unknown_number_format_is_told(flux: Path) -> None:
    content = (flux / weights.FILE).read_bytes()
    (flux / weights.FILE).write_bytes(content.replace(b'"F32"', b'"F4" ', 1))
    with pytest.raises(weights.Unsuitable, match="has the number format F4"):
        weights.empty_model(FluxTransformer2DModel, flux, torch.float32)


def test_what_is_unsuitable_is_loaded_slowly_and_told(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(flux, lambda state: state.update(extra=torch.zeros(3)))
    meta = torch.device("meta")
    with caplog.at_level(logging.WARNING, logger=loader.__name__):
        model = loader._load(FluxTransformer2DModel, flux, torch.float32, meta, lambda done, total: None)
        assert model.device == meta
        assert loader._empty(FluxTransformer2DModel, flux, torch.float32, meta).device == CPU
    own = [record.getMessage() for record in caplog.records if record.name == loader.__name__]
    assert own == [f"{flux} is loaded slowly, by from_pretrained: the model has no extra"] * 2


def test_a_truncated_file(flux: Path) -> None:
    whole = (flux / weights.FILE).read_bytes()
    stored = reader.read_header(flux / weights.FILE)
    (flux / weights.FILE).write_bytes(whole[:-100])
    message = f"has {len(whole) - 100} bytes, but its tensors end at byte {len(whole)}; download it again"
    with pytest.raises(ConfigError, match=message):
        weights.load_model(FluxTransformer2DModel, flux, torch.float32, CPU)
    targets = [Target(each, torch.empty(each.shape)) for each in stored.values()]
    with pytest.raises(ConfigError, match=f"ends at byte {len(whole) - 100}, but its tensors need"):
        reader.read(targets, CPU)
    (flux / weights.FILE).write_bytes(whole[:100])
    with pytest.raises(ConfigError, match="is no whole safetensors file"):
        reader.read_header(flux / weights.FILE)


def test_progress_comes_in_the_calling_thread(flux: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total))

    weights.load_model(FluxTransformer2DModel, flux, torch.float32, CPU, progress)
    total = sum(each.end - each.start for each in reader.read_header(flux / weights.FILE).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


PARTS = [
    ((24, 10), None),
    ((24, 10), Part(0, (24,), 1, 2)),
    ((24, 10), Part(0, (12, 8, 4), 3, 4)),
    ((6, 24), Part(1, (24,), 2, 3)),
    ((6, 24), Part(1, (8, 16), 1, 4)),
    ((4, 12, 3, 2), Part(1, (12,), 0, 2)),
    ((24,), Part(0, (16, 8), 1, 2)),
    ((), None),
    ((0, 5), None),
]


@pytest.mark.parametrize("num_threads", [1, 5])
@pytest.mark.parametrize("buffer_bytes", [7, 64, 2**20])
@DEVICES
def test_parts_of_any_shape(device: torch.device, num_threads: int, buffer_bytes: int, tmp_path: Path) -> None:
    """Whatever the size of the buffers, and where tensors of an odd number of bytes lie between the others."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    whole = {
        f"{dtype}.{i}": (torch.randn(shape) * 9).to(dtype) for i, (shape, _) in enumerate(PARTS) for dtype in dtypes
    }
    save_file(whole, tmp_path / "x.safetensors")
    stored, targets, wanted = reader.read_header(tmp_path / "x.safetensors"), [], []
    for name, tensor in whole.items():
        part = PARTS[int(name[-1])][1]
        if part:
            blocks = [
                block.chunk(part.size, part.dim)[part.index] for block in tensor.split(part.block_sizes, part.dim)
            ]
            tensor = torch.cat(blocks, part.dim)
        into = torch.empty_like(tensor, dtype=torch.float64, device=device)
        targets.append(Target(stored[name], into, part))
        wanted.append(tensor.to(torch.float64))
    reader.read(targets, device, options=Options(num_threads, buffer_bytes))
    for target, tensor in zip(targets, wanted, strict=True):
        assert torch.equal(target.into.cpu(), tensor), target.stored


def test_a_rank_reads_only_its_rows(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(64, 32)}, tmp_path / "x.safetensors")
    stored, seen = reader.read_header(tmp_path / "x.safetensors")["x"], []
    part = Part(0, (32, 32), 1, 4)
    reader.read([Target(stored, torch.empty(16, 32), part)], CPU, lambda *progress: seen.append(progress))
    assert seen[-1] == (16 * 32 * 4, 16 * 32 * 4)


@pytest.fixture
def second_of_two(checkpoint: Any, family: str) -> Iterator[None]:
    checkpoint(family)  # which only the first of two would write
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("family", WITH_TENSOR)
@DEVICES
def test_tensor_parallel_parts(device: torch.device, family: str, checkpoint: Any) -> None:
    """Cut while they are empty and then read, as on a GPU, and cut from the mapped files, as on a CPU."""
    folder, dtype, parallel = checkpoint(family), torch.bfloat16, DitParallel(tensor=2)
    mesh = build_mesh(parallel, "cpu")
    wanted = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    names = transformers_of(wanted)
    empty = {name: weights.empty_model(type(each), folder / name, dtype)[0] for name, each in names.items()}
    pipe = type(wanted).from_pretrained(folder, dtype=dtype, **empty)
    for each in (pipe, wanted):
        apply_parallel(each, parallel, mesh)
    assert all(each.device.type == "meta" for each in empty.values())
    seen: list[tuple[int, int, str]] = []
    group = DitGroup(type="dit", name="m", source="x", parallel=parallel)
    ranks = Ranks.of(mesh, "tensor")
    loader.read_parts(pipe, folder, dtype, device, group, lambda *progress: seen.append(progress), ranks)
    for name, transformer in transformers_of(wanted).items():
        assert_same(transformers_of(pipe)[name], transformer, device)
    assert {name for _, _, name in seen} == set(names)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("family", FAMILIES)
@DEVICES
def test_the_pipeline_has_what_was_loaded(
    device: torch.device, family: str, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = loader._load
    monkeypatch.setattr(loader, "_load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    group = DitGroup.model_validate({"name": "x", "type": "dit", "source": "x"})
    pipe = loader.load_pipeline(checkpoint(family), torch.float32, device, group, lambda *progress: None)
    modules = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    assert {id(each) for each in modules} == {id(each) for each in loaded}
    wanted = DiffusionPipeline.from_pretrained(checkpoint(family), dtype=torch.float32)
    assert dict(pipe.config) == dict(wanted.config)
    for name, module in wanted.components.items():
        if isinstance(module, torch.nn.Module):
            assert_same(pipe.components[name], module, device)


def test_a_cpu_rank_maps_its_files(checkpoint: Any) -> None:
    group = DitGroup.model_validate({"name": "x", "type": "dit", "source": "x", "parallel": {"tensor": 2}})
    seen: list[tuple[int, int, str]] = []
    pipe = loader.load_pipeline(checkpoint("flux"), torch.float32, CPU, group, lambda *progress: seen.append(progress))
    assert not any(parameter.is_meta for each in transformers_of(pipe).values() for parameter in each.parameters())
    assert seen[-1][0] == seen[-1][1]


class Payload:
    """What a pickle does to who reads it without care: this one writes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._file}",)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize("decoy", [False, True])
def test_pickled_weights_are_refused(decoy: bool, component: str, tmp_path: Path) -> None:
    """Also where a file in safetensors lies beside them that nobody would read."""
    folder, payload = build("flux", tmp_path / "flux"), Payload(tmp_path / "ran")
    name = "diffusion_pytorch_model.bin" if component == "transformer" else "pytorch_model.bin"
    for file in (folder / component).glob("*.safetensors"):
        torch.save({"x": payload}, file.with_name(name))
        file.rename(file.with_name("other.safetensors")) if decoy else file.unlink()
    error = OSError if decoy else ConfigError
    with pytest.raises(error, match="safetensors" if decoy else rf"only {name}; .*allow_pickle_weights: true"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    folder = build("flux", tmp_path)
    wanted = load(folder)
    (folder / "transformer" / weights.FILE).unlink()
    torch.save(wanted.transformer.state_dict(), folder / "transformer" / "diffusion_pytorch_model.bin")
    assert_same(load(folder, allow_pickle_weights=True).transformer, wanted.transformer)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = build("flux", tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "scheduler" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["mine", "Mine"]}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def load(folder: Path, **keys: Any) -> Any:
    group = DitGroup.model_validate({"name": "x", "type": "dit", "source": "x", **keys})
    return loader.load_pipeline(folder, torch.float32, CPU, group, lambda *progress: None)
