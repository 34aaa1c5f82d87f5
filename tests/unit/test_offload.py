"""Weights in host memory: the image stays the same, and no more is on the device than the kind says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.accel.apply import Accelerators
from omni_ray.accel.cache.apply import apply_cache
from omni_ray.accel.hooks import register
from omni_ray.accel.offload import Offload, apply_offload, home
from omni_ray.accel.offload.packed import Packed, num_bytes, pack
from omni_ray.accel.offload.ring import Ring
from omni_ray.accel.offload.transfers import Recorder
from omni_ray.config.spec import Batching, Cache, DitOffload
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from tests.lanes import run_lanes, usage
from tests.ranks import CPU, jobs_of, load

KINDS = ("model", "layerwise", "sequential")


def serve(pipe: Any, offload: Offload | None, family: str, monkeypatch: pytest.MonkeyPatch, cache: Any = None) -> Any:
    accelerators = Accelerators(teacache=cache, offload=offload)
    loop = EngineLoop(pipe, Batching(max_num_seqs=4), accelerators=accelerators, device=CPU)
    return run_lanes(loop, jobs_of(family)[:4], monkeypatch)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "teacache"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "wan"])
def test_offload_changes_no_image(
    family: str, kind: Any, cached: bool, tiny: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Cache(kind="teacache", threshold=1e9, max_consecutive_skips=1, coefficients=(1.0, 0.0))
    plain = tiny(family) if not cached else load(tiny_folder(family))
    wanted, _ = serve(plain, None, family, monkeypatch, apply_cache(plain, spec)[0] if cached else None)
    pipe = load(tiny_folder(family))
    cache = apply_cache(pipe, spec)[0] if cached else None
    offload = apply_offload(pipe, DitOffload(kind=kind), CPU)
    made, events = serve(pipe, offload, family, monkeypatch, cache)
    for job_id, image in wanted.items():
        assert np.abs(made[job_id] - image).max() < 1e-5
    costs = [usage(each) for each in events.values()]
    assert sum(cost.offload_paid_s for cost in costs) > 0
    assert (sum(cost.steps_skipped for cost in costs) > 0) == cached


def brought(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Packed, int]]:
    """What is on the device, as blocks that were brought and not parked, each time that one comes."""
    here: list[Packed] = []
    seen: list[tuple[Packed, int]] = []
    bring, park = Packed.bring, Packed.park

    def coming(self: Packed) -> None:
        here.append(self)
        seen.append((self, len(here)))
        bring(self)

    def going(self: Packed) -> None:
        if self in here:
            here.remove(self)
        park(self)

    monkeypatch.setattr(Packed, "bring", coming)
    monkeypatch.setattr(Packed, "park", going)
    return seen


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_one_component_at_a_time_is_on_the_device(
    kind: Any, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(tiny_folder("wan"))
    offload = apply_offload(pipe, DitOffload(kind=kind), CPU)
    seen = brought(monkeypatch)
    serve(pipe, offload, "wan", monkeypatch)
    assert {count for _, count in seen} == {1}
    assert len({packed for packed, _ in seen}) == (4 if kind == "model" else 3)  # the VAE stays with `sequential`


def test_lanes_of_one_expert_go_before_those_of_the_other(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests, of 18 steps together: the experts change places far less often than the steps do."""
    pipe = load(tiny_folder("wan"))
    offload = apply_offload(pipe, DitOffload(kind="sequential"), CPU)
    seen = brought(monkeypatch)
    _, events = serve(pipe, offload, "wan", monkeypatch)
    experts = [packed for packed, _ in seen if packed not in [each for each, _ in seen[:1]]]
    assert sum(usage(each).steps_computed for each in events.values()) == 18
    assert len(experts) <= 9, "every second step"  # 3 to 6, by when the requests come


def storages(module: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


def test_a_part_of_the_weights_stays(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_folder("flux"))
    apply_offload(pipe, DitOffload(kind="model", cpu_offload_gb=1e-6), CPU)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    packed = [name for name, part in modules.items() if len(storages(part)) == 1]
    sizes = {name: num_bytes([part]) for name, part in modules.items() if name.startswith("text_encoder")}
    assert packed == [max(sizes, key=lambda name: sizes[name])]


def test_a_part_of_the_blocks_streams(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_folder("flux"))
    streamed: list[Any] = []
    monkeypatch.setattr("omni_ray.accel.offload.apply.Ring", lambda blocks, *_: streamed.extend(blocks))
    block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
    apply_offload(pipe, DitOffload(kind="layerwise", cpu_offload_gb=block / 2**30), CPU)
    assert (
        1 <= len(streamed) < len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    )


def test_nothing_is_copied_back_or_twice() -> None:
    linear = torch.nn.Linear(8, 8)
    weight = linear.weight.detach().clone()
    (packed,) = pack([linear], CPU)
    master = linear.weight.data_ptr()
    packed.bring()
    assert linear.weight.data_ptr() != master
    linear.weight.data.zero_()
    packed.park()
    assert linear.weight.data_ptr() == master
    assert torch.equal(linear.weight, weight)


def test_tied_weights_stay_tied() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    (packed,) = pack([first, second], CPU)
    packed.bring()
    assert first.weight is second.weight


def test_blocks_are_cut_at_the_limit() -> None:
    modules = [torch.nn.Linear(16, 16, bias=False) for _ in range(5)]
    assert [packed.num_bytes for packed in pack(modules, CPU, max_bytes=2 * 1024)] == [2048, 2048, 1024]


def test_a_ring_takes_blocks_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [torch.nn.Linear(4, 4) for _ in range(5)]
    x = torch.randn(2, 4)
    wanted = [block(x) for block in blocks]
    Ring([(block, pack([block], CPU)[0]) for block in blocks], CPU, Recorder(CPU))
    for i in (0, 1, 2, 4, 3, 3, 0, 2):
        assert torch.equal(blocks[i](x), wanted[i])


def test_two_hooks_that_replace_the_forward_are_refused() -> None:
    class Replaces:
        def __init__(self) -> None: ...
        def initialize_hook(self, module: Any) -> Any:
            return module

        def new_forward(self, *_: Any) -> None: ...

    module, hook = torch.nn.Linear(2, 2), Replaces()
    register(module, "first", hook)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="second and first both replace the forward of Linear"):
        register(module, "second", Replaces())  # type: ignore[arg-type]


def test_where_components_are_loaded() -> None:
    cuda = torch.device("cuda")
    places = {
        kind: [home(name, DitOffload(kind=kind), cuda).type for name in ("transformer_2", "text_encoder", "vae")]
        for kind in ("none", *KINDS)
    }
    assert places == {
        "none": ["cuda", "cuda", "cuda"],
        "model": ["cpu", "cpu", "cpu"],
        "layerwise": ["cpu", "cpu", "cuda"],
        "sequential": ["cpu", "cpu", "cuda"],
    }


def test_a_size_without_a_use_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu_offload_gb: says nothing with kind 'sequential'"):
        DitOffload(kind="sequential", cpu_offload_gb=1.0)
