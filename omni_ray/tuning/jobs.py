"""The jobs that a tool makes of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omni_ray.accel.capabilities import read_capabilities
from omni_ray.accel.loader import resolve
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError
from omni_ray.messages import Job
from omni_ray.sources import resolve_source
from omni_ray.tuning.run import in_a_thread, load


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty. Raises ConfigError where there is none."""
    try:
        prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise ConfigError(f"--prompts: {path} has no prompt; write one a line")
    return prompts


def jobs_of(group: DitGroup, prompts: list[str], arguments: argparse.Namespace) -> list[Job]:
    """A job for each prompt, with seeds of 0, 1, …, and the model's defaults where ``arguments`` say nothing.

    Raises ConfigError where the model does not take an argument.
    """
    pipe = in_a_thread(load, group.model_copy(update={"load_format": "dummy"}))
    capabilities = read_capabilities(pipe, resolve(resolve_source(group.source), group.allow_pickle_weights), group)
    asked: dict[str, Any] = {
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "negative_prompt": arguments.negative_prompt,
    }
    if arguments.size:
        asked["width"], asked["height"] = _size(arguments.size, capabilities.size_multiple)
    asked = {name: value for name, value in asked.items() if value is not None}
    if unknown := sorted(asked.keys() - capabilities.fields):
        raise ConfigError(f"{capabilities.pipeline} takes no {', '.join(unknown)}; leave it out")
    params = capabilities.defaults | asked
    return [
        Job(id=f"prompt-{i}", model=group.name, group=group.id, params=params | {"prompt": prompt}, seed=i)
        for i, prompt in enumerate(prompts)
    ]


def _size(text: str, multiple: int) -> tuple[int, int]:
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError as error:
        raise ConfigError(f"--size {text!r} is no size; write it as 1024x1024") from error
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise ConfigError(f"--size {text}: width and height have to be multiples of {multiple}")
    return width, height
