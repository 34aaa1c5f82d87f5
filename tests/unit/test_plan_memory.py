"""The activations that a plan reckons with, against the tensors that the real models hold, counted without a device.

A model runs on torch's meta device; a dispatch mode adds up the storages that are alive. What a kernel takes for itself
is not in it, and attention counts as one that needs no scores.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni_ray.accel.parallel.decode import AUTOENCODERS
from omni_ray.config.spec import DitGroup, DitParallel, Vae
from omni_ray.plan import autoencoders, memory
from omni_ray.plan.autoencoders import autoencoder
from omni_ray.plan.request import Request
from omni_ray.plan.transformers import transformer

pytestmark = pytest.mark.filterwarnings("ignore")


class Live(TorchDispatchMode):
    """Counts the bytes of all storages but the module's own; ``peak`` is the most that were alive at once."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._known = {each.untyped_storage()._cdata for each in [*module.parameters(), *module.buffers()]}
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live -= num_bytes


@pytest.fixture(autouse=True)
def attention_without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)
    )


def measured(module: torch.nn.Module, run: Callable[[Any], Any]) -> int:
    with torch.no_grad(), Live(module) as live:
        run(module)
    return live.peak


def on_meta(cls: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config).to(torch.bfloat16).eval()


def new(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def request(image: int, text: int, frames: int = 1, width: int = 1024, height: int = 1024) -> Request:
    return Request(width, height, frames, 1, 1, image, text)


GROUP = DitGroup.model_validate({"name": "x", "type": "dit", "source": "x", "batching": {"max_num_batched_tokens": 1}})

FORWARDS: dict[str, tuple[Any, dict[str, Any], tuple[int, int], Callable[[Any], Any]]] = {
    "flux": (
        FluxTransformer2DModel,
        {"num_layers": 2, "num_single_layers": 2},
        (4096, 512),
        lambda model: model(
            hidden_states=new(1, 4096, 64),
            encoder_hidden_states=new(1, 512, 4096),
            pooled_projections=new(1, 768),
            timestep=new(1),
            img_ids=new(4096, 3),
            txt_ids=new(512, 3),
        ),
    ),
    "flux2": (
        Flux2Transformer2DModel,
        {"num_layers": 2, "num_single_layers": 2},
        (4096, 512),
        lambda model: model(
            hidden_states=new(1, 4096, 128),
            encoder_hidden_states=new(1, 512, 15360),
            timestep=new(1),
            guidance=new(1),
            img_ids=new(4096, 4),
            txt_ids=new(512, 4),
        ),
    ),
    "qwen_image": (
        QwenImageTransformer2DModel,
        {"num_layers": 2},
        (4096, 64),
        lambda model: model(
            hidden_states=new(1, 4096, 64),
            encoder_hidden_states=new(1, 64, 3584),
            timestep=new(1),
            img_shapes=[[(1, 64, 64)]],
        ),
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {"n_layers": 2, "n_refiner_layers": 1},
        (4096, 64),
        lambda model: model([new(16, 1, 128, 128)], new(1), [new(64, 2560)]),
    ),
    "sd3": (
        SD3Transformer2DModel,
        {"num_layers": 3, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        (4096, 333),
        lambda model: model(
            hidden_states=new(1, 16, 128, 128),
            encoder_hidden_states=new(1, 333, 4096),
            pooled_projections=new(1, 2048),
            timestep=new(1),
        ),
    ),
    "wan": (
        WanTransformer3DModel,
        {"num_layers": 2},
        (32760, 512),
        lambda model: model(
            hidden_states=new(1, 16, 21, 60, 104), encoder_hidden_states=new(1, 512, 4096), timestep=new(1)
        ),
    ),
}


@pytest.mark.parametrize("family", FORWARDS)
def test_forward(family: str) -> None:
    """Within a third: activations are a few percent of what a rank needs."""
    cls, config, (image, text), run = FORWARDS[family]
    known = transformer({"_class_name": cls.__name__, **config})
    assert known is not None
    planned = memory.forward_bytes(GROUP, known, request(image, text), 2)
    assert planned == pytest.approx(measured(on_meta(cls, **config), run), rel=0.35)


IMAGE_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
}


@pytest.mark.parametrize(
    ("cls", "config", "latent", "asked"),
    [
        (AutoencoderKL, IMAGE_VAE, (1, 16, 128, 128), request(4096, 0)),
        (AutoencoderKLQwenImage, {}, (1, 16, 1, 128, 128), request(4096, 0)),
        (AutoencoderKLWan, {}, (1, 16, 3, 60, 104), request(4680, 0, frames=9, width=832, height=480)),
    ],
)
def test_decode(cls: Any, config: dict[str, Any], latent: tuple[int, ...], asked: Request) -> None:
    known = autoencoder({"_class_name": cls.__name__, **config})
    peak = measured(on_meta(cls, **config), lambda vae: vae.decode(new(*latent)))
    assert memory.decode_bytes(GROUP, known, asked, 2) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("cls", "config", "latent", "asked"),
    [
        (AutoencoderKL, IMAGE_VAE | {"sample_size": 512}, (1, 16, 128, 128), request(4096, 0)),
        (AutoencoderKLQwenImage, {}, (1, 16, 1, 128, 128), request(4096, 0)),
        (AutoencoderKLWan, {}, (1, 16, 3, 60, 104), request(4680, 0, frames=9, width=832, height=480)),
    ],
)
def test_decode_in_tiles(cls: Any, config: dict[str, Any], latent: tuple[int, ...], asked: Request) -> None:
    known = autoencoder({"_class_name": cls.__name__, **config})
    vae = on_meta(cls, **config)
    vae.enable_tiling()
    peak = measured(vae, lambda vae: vae.decode(new(*latent)))
    tiled = GROUP.model_copy(update={"vae": Vae(tiling=True)})
    assert memory.decode_bytes(tiled, known, asked, 2) == pytest.approx(peak, rel=0.1)
    assert peak < memory.decode_bytes(GROUP, known, asked, 2) / 2


@pytest.mark.parametrize("slicing", [False, True])
def test_decode_of_several_in_tiles(slicing: bool) -> None:
    config = IMAGE_VAE | {"sample_size": 512}
    known, vae = autoencoder({"_class_name": "AutoencoderKL", **config}), on_meta(AutoencoderKL, **config)
    vae.use_tiling, vae.use_slicing = True, slicing
    peak = measured(vae, lambda vae: vae.decode(new(3, 16, 128, 128)))
    group = GROUP.model_copy(update={"vae": Vae(tiling=True, slicing=slicing)})
    asked = dataclasses.replace(request(3 * 4096, 0, height=3 * 1024), pictures=3)
    assert memory.decode_bytes(group, known, asked, 2) == pytest.approx(peak, rel=0.1)


def test_ranks_share_a_decode_where_the_engine_can_split_it() -> None:
    assert autoencoders.SPLIT_BY_ROWS == AUTOENCODERS
    known = autoencoder({"_class_name": "AutoencoderKLWan"})
    spread = GROUP.model_copy(update={"parallel": DitParallel(cfg=2, ulysses=4)})
    whole = GROUP.model_copy(update={"parallel": DitParallel(cfg=2, ulysses=4, vae="whole")})
    assert [memory.decode_ranks(group, known) for group in (GROUP, spread, whole)] == [1, 8, 1]
