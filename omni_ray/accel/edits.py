"""The pipelines that draw from an image, or inside a mask, with the modules of one that draws from text."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

SUFFIXES = {"image": "Img2ImgPipeline", "mask": "InpaintPipeline"}
"""diffusers names them after the pipeline that draws from text."""


def edit_pipelines(pipe: DiffusionPipeline) -> dict[str, DiffusionPipeline]:
    """By what they take: ``image``, or ``mask`` (and an image). They share all modules of ``pipe``. Empty where
    diffusers has none of its family, and without ``image`` where ``pipe`` itself takes one."""
    found: dict[str, DiffusionPipeline] = {}
    family = type(pipe).__name__.removesuffix("Pipeline")
    for kind, suffix in SUFFIXES.items():
        cls: Any = getattr(diffusers, family + suffix, None)
        if cls is None or (kind == "image" and "image" in inspect.signature(pipe.__call__).parameters):
            continue
        wanted = inspect.signature(cls.__init__).parameters
        found[kind] = cls(**{name: part for name, part in pipe.components.items() if name in wanted})
        found[kind].set_progress_bar_config(disable=True)
    return found
