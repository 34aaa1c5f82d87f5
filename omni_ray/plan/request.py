"""The request that a plan reckons with: the model's default size, steps and guidance, as the pipeline has them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from omni_ray.config.spec import DitGroup
from omni_ray.plan.autoencoders import Autoencoder
from omni_ray.plan.checkpoint import Checkpoint


@dataclass(frozen=True)
class Request:
    """One image or video. ``branches`` are the forwards of a step: 2 with classifier-free guidance."""

    width: int
    height: int
    frames: int
    steps: int
    branches: int
    image_tokens: int
    text_tokens: int
    patch: int = 2
    """Latents along an edge that are one token of the transformer."""
    pictures: int = 1
    """What is asked for at once: their pixels are one picture's here, as they need about the same."""

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}"
        return size if self.frames == 1 else f"{size}, {self.frames} frames"


@dataclass(frozen=True)
class Defaults:
    """A pipeline's own defaults. ``guidance`` is the argument that guides; above ``off`` a step has two forwards.

    ``needs_prompt``: only with a negative prompt.
    """

    steps: int
    text: int
    guidance: str = ""
    scale: float = 0.0
    off: float = 1.0
    needs_prompt: bool = False
    size: tuple[int, int, int] = (1024, 1024, 1)
    patch: int = 2


PIPELINES: dict[str, Defaults] = {
    "FluxPipeline": Defaults(28, 512, "true_cfg_scale", 1.0, needs_prompt=True),
    "Flux2Pipeline": Defaults(50, 512),
    "Flux2KleinPipeline": Defaults(50, 512, "guidance_scale", 4.0),
    "QwenImagePipeline": Defaults(50, 64, "true_cfg_scale", 4.0, needs_prompt=True),
    # Guided by a component, which distilled checkpoints lack: they take half of these seconds.
    "HunyuanImagePipeline": Defaults(50, 1128, "guider", 3.5, size=(2048, 2048, 1), patch=1),
    "ZImagePipeline": Defaults(50, 64, "guidance_scale", 5.0, off=0.0),
    "StableDiffusion3Pipeline": Defaults(28, 333, "guidance_scale", 7.0),
    "WanPipeline": Defaults(50, 512, "guidance_scale", 5.0, size=(832, 480, 81)),
    "WanImageToVideoPipeline": Defaults(50, 512, "guidance_scale", 5.0, size=(832, 480, 81)),
    # As if its windows were one.
    "HeliosPipeline": Defaults(50, 512, "guidance_scale", 5.0, size=(640, 384, 132)),
}
UNKNOWN = Defaults(50, 512)


def default_request(group: DitGroup, checkpoint: Checkpoint, vae: Autoencoder) -> Request:
    """The group's request where a client says nothing but a prompt."""
    own = PIPELINES.get(checkpoint.pipeline, UNKNOWN)
    values: dict[str, Any] = checkpoint.defaults | group.defaults
    guided = bool(own.guidance) and float(values.get(own.guidance, own.scale)) > own.off
    if own.needs_prompt and group.parallel.cfg == 1:
        guided = guided and values.get("negative_prompt") is not None
    request = Request(
        width=0,
        height=0,
        frames=1,
        steps=int(values.get("num_inference_steps", own.steps)),
        branches=2 if guided else 1,
        image_tokens=0,
        text_tokens=own.text,
        patch=own.patch,
    )
    width, height, frames = (
        int(values.get(name, size)) for name, size in zip(("width", "height", "num_frames"), own.size, strict=True)
    )
    return resize(request, vae, width, height, frames)


def resize(request: Request, vae: Autoencoder, width: int, height: int, frames: int) -> Request:
    """The request for another size."""
    edge = request.patch * vae.spatial
    tokens = (width // edge) * (height // edge) * ((frames - 1) // vae.temporal + 1)
    return dataclasses.replace(request, width=width, height=height, frames=frames, image_tokens=tokens)


def square(request: Request, vae: Autoencoder, num_pixels: int, frames: int, pictures: int = 1) -> Request:
    """The request for a square of ``num_pixels``, or for so many pictures that are as large together."""
    edge = request.patch * vae.spatial
    side = max(edge, math.isqrt(num_pixels) // edge * edge)
    return dataclasses.replace(resize(request, vae, side, side, frames), pictures=pictures)
