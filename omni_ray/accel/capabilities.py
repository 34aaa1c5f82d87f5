"""What a loaded pipeline accepts, read from the pipeline itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from diffusers import DiffusionPipeline

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.messages import Capabilities

INTERNAL = frozenset(
    (  # noqa: SIM905
        "self output_type return_dict generator latents callback_on_step_end callback_on_step_end_tensor_inputs "
        "num_images_per_prompt num_videos_per_prompt image mask_image sigmas timesteps joint_attention_kwargs "
        "attention_kwargs"
    ).split()
)
"""Arguments of a pipeline's call that are the engine's business, or that no JSON body can hold."""


IMAGES: dict[Literal["image", "mask"], str] = {"image": "image", "mask": "mask_image"}
"""What comes with a request, and the argument of a pipeline's call that it becomes."""

DRAW_FROM_IMAGES = (
    "Img2ImgPipeline",
    "InpaintPipeline",
    "FillPipeline",
    "EditPipeline",
    "EditPlusPipeline",
    "ImageToVideoPipeline",
)
"""How diffusers' names end of pipelines that cannot do without their images, whatever the signature says."""

NO_EDITS: Mapping[str, DiffusionPipeline] = MappingProxyType({})


def read_capabilities(
    pipe: DiffusionPipeline,
    folder: Path,
    group: DitGroup,
    edits: Mapping[str, DiffusionPipeline] = NO_EDITS,
) -> Capabilities:
    """Fields, defaults and limits of ``pipe``. Defaults come, the later over the earlier, from the signature, from
    ``omni_ray.json`` beside the checkpoint and from the group's ``defaults``; an unknown name there is a ConfigError.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    fields = _fields(pipe)
    video = "num_frames" in parameters
    defaults = {
        name: parameters[name].default for name in fields if isinstance(parameters[name].default, (int, float, str))
    }
    defaults = _default_size(pipe, parameters) | defaults | _shipped_defaults(folder) | group.defaults
    if unknown := sorted(set(defaults) - fields):
        raise ConfigError(
            f"defaults of {group.id}: {type(pipe).__name__} takes no {', '.join(unknown)}; "
            f"it takes {', '.join(sorted(fields))}"
        )
    own_images = {name for name, parameter in IMAGES.items() if parameter in parameters}
    has_count = {"num_images_per_prompt", "num_videos_per_prompt"} & set(parameters)
    return Capabilities(
        pipeline=type(pipe).__name__,
        output="video" if video else "image",
        fields=frozenset(fields | own_images),
        edits={kind: frozenset(_fields(each) | {"image"}) for kind, each in edits.items()},
        defaults=defaults,
        size_multiple=_size_multiple(pipe),
        frame_multiple=int(getattr(pipe, "vae_scale_factor_temporal", 1)) if video else 1,
        max_pixels=group.limits.max_pixels,
        max_steps=group.limits.max_steps,
        max_outputs=group.limits.max_outputs if has_count else 1,
        max_frames=group.limits.max_frames if video else 1,
        needs=frozenset(own_images if type(pipe).__name__.endswith(DRAW_FROM_IMAGES) else ()),
    )


def _fields(pipe: DiffusionPipeline) -> set[str]:
    """Those arguments of a pipeline's call that a request may say."""
    parameters = inspect.signature(pipe.__call__).parameters
    return {name for name in parameters if name not in INTERNAL and "embeds" not in name and "ip_adapter" not in name}


def _shipped_defaults(folder: Path) -> dict[str, Any]:
    file = folder / "omni_ray.json"
    return dict(json.loads(file.read_text())["defaults"]) if file.is_file() else {}


def _spatial_factor(pipe: DiffusionPipeline) -> int:
    factor: Any = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)
    return int(factor)


def _size_multiple(pipe: DiffusionPipeline) -> int:
    """The VAE's factor times two: every family served here packs or patches its latents 2 x 2."""
    return 2 * _spatial_factor(pipe)


def _default_size(pipe: DiffusionPipeline, parameters: Any) -> dict[str, int]:
    """Where the signature leaves the size open, the pipeline makes ``default_sample_size`` latent pixels."""
    edge = int(getattr(pipe, "default_sample_size", 128)) * _spatial_factor(pipe)
    return {name: edge for name in ("height", "width") if name in parameters}
