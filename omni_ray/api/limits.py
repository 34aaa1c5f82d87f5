"""What a DiT model can do: checks a request against it, and makes it a job."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_ray.api import caller
from omni_ray.api.protocol import Generation
from omni_ray.api.wording import did_you_mean, shown
from omni_ray.config.keys import KeyLimits
from omni_ray.errors import RequestError
from omni_ray.messages import Job, MediaFormat, Route

NO_FIELDS = {"prompt", "image", "mask"}
"""What a body calls otherwise, or does not hold."""

FORMATS: dict[str, tuple[MediaFormat, ...]] = {"image": ("png", "jpeg", "webp"), "video": ("mp4",)}
"""By the kind of output; the first is the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a job is made from. ``needs_prompt``: an empty one is an error; ``needs_image``: so is none. ``image_field``
    is what the request calls its images."""

    prompt: str
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    needs_prompt: bool = True
    needs_image: bool = False
    image_field: str = "image"


def make_job(request: Generation, inputs: Inputs, route: Route, request_id: str) -> Job:
    """The job that ``request`` asks for; RequestError naming every field that ``route`` cannot fulfil."""
    if problems := list(_problems(request, inputs, route.limits)):
        sentences = dict.fromkeys(f"{field}: {problem}" for field, problem in problems)
        raise RequestError("; ".join(sentences), param=problems[0][0])
    job = Job(
        id=f"{request_id[:64]}-{uuid.uuid4().hex[:8]}",
        model=route.name,
        group=route.group,
        params={"prompt": inputs.prompt, **request.pipeline_args},
        num_outputs=request.num_outputs,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        owner=caller.owner(),
        images=inputs.images,
        mask=inputs.mask,
        format=request.output_format or FORMATS[route.limits["output"]][0],
        compression=100 if request.output_compression is None else request.output_compression,
    )
    caller.note_job(job)
    return job


Problems = Iterator[tuple[str, str]]
"""Names of fields, and what is wrong with each."""


def _problems(request: Generation, inputs: Inputs, limits: dict[str, Any]) -> Problems:
    texts = {"prompt": inputs.prompt, "negative_prompt": request.negative_prompt}
    yield from _text_problems(texts, limits["max_prompt_chars"], inputs.needs_prompt)
    yield from _image_problems(inputs, limits)
    yield from _field_problems(request, _fields(inputs, limits), limits["defaults"])
    yield from _size_problems(request, limits)
    yield from _count_problems(request, limits)
    yield from _format_problems(request, limits["output"])
    yield from _key_problems(request, limits, caller.limits())


def _fields(inputs: Inputs, limits: dict[str, Any]) -> set[str]:
    """The fields of the pipeline that runs, which depends on what comes with the prompt."""
    if not inputs.images or "image" in limits["fields"]:
        return {*limits["fields"]}
    return {*limits["edits"].get("mask" if inputs.mask else "image", limits["fields"])}


def _image_problems(inputs: Inputs, limits: dict[str, Any]) -> Problems:
    takes = {"image", "mask"} & {*limits["fields"]} | {*limits["edits"]}
    if (inputs.needs_image or "image" in limits["needs"]) and not inputs.images:
        yield inputs.image_field, "is missing; send at least one"
    if "mask" in limits["needs"] and not inputs.mask:
        yield "mask", "is missing: this model draws inside one"
    if inputs.images and "image" not in takes:
        yield inputs.image_field, "is not taken: this model draws from text alone"
    if inputs.mask and "mask" not in takes:
        yield "mask", "is not taken: this model has no pipeline that draws inside a mask"


def _text_problems(texts: dict[str, str | None], max_chars: int, needs_prompt: bool) -> Problems:
    for name, text in texts.items():
        if name == "prompt" and needs_prompt and not (text or "").strip():
            yield name, "is empty; say what to draw"
        if text is not None and len(text) > max_chars:
            yield name, f"has {len(text)} characters, at most {max_chars} are taken"


def _field_problems(request: Generation, fields: set[str], defaults: dict[str, Any]) -> Problems:
    extra = request.__pydantic_extra__
    taken = ", ".join(sorted({*fields} - NO_FIELDS))
    for name, value in request.pipeline_args.items():
        if name in NO_FIELDS or (name in extra and name not in fields):
            known = {*type(request).model_fields, *fields}
            yield name, f"is no field of this request{did_you_mean(name, known) or '; its pipeline takes ' + taken}"
        elif name not in fields:
            yield name, f"is not taken by the pipeline of this model, which takes {taken}"
        elif name in extra and not _fits(value, defaults.get(name)):
            yield name, f"{shown(value)} is not of the kind of its default {shown(defaults.get(name))}"


def _fits(value: object, default: object) -> bool:
    """Whether a value can stand in the place of a default, in so far as their kinds tell."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, (bool, int, float, str)) if default is None else type(value) is type(default)


def _size_problems(request: Generation, limits: dict[str, Any]) -> Problems:
    said = dict(zip(("width", "height"), request.pixels, strict=True))
    multiple, max_pixels = limits["size_multiple"], limits["max_pixels"]
    for name, pixels in said.items():
        if pixels is not None and pixels % multiple:
            near = max(multiple, round(pixels / multiple) * multiple)
            yield _said_in(request, name), f"{pixels} is no multiple of {multiple}; {near} is"
    yield from _pixel_problems(request, limits, max_pixels, "that are taken")
    yield from _memory_problems(request, limits)


def _memory_problems(request: Generation, limits: dict[str, Any]) -> Problems:
    """Pictures or frames that are too many for their size."""
    room, (width, height) = limits["room"], _size(request, limits)
    if room is None or width * height > limits["max_pixels"]:
        return
    num, frames, pixels = request.num_outputs, _frames(request, limits), width * height
    each = max(frames, room["frames"]) * pixels  # a shorter video needs no less to be decoded
    if frames * pixels > (all_frames := room["alone"] * room["frames"]):
        multiple = limits["frame_multiple"]
        fit = (all_frames // pixels - 1) // multiple * multiple + 1
        problem = f"{frames} frames of {width} x {height} pixels are more than the {all_frames} pixels"
        yield "num_frames", f"{problem} that fit into memory at once; ask for {fit} at most"
    elif num > 1 and num * each > room["together"] * room["frames"]:
        fit = max(1, room["together"] * room["frames"] // each)
        problem = f"{num} x {width} x {height} pixels are more than the {fit * pixels} that fit into memory at once"
        yield _count_field(request), f"{problem}; ask for {fit} at most"


def _frames(request: Generation, limits: dict[str, Any]) -> int:
    return int(request.num_frames or limits["defaults"].get("num_frames", 1))


def _size(request: Generation, limits: dict[str, Any]) -> tuple[int, int]:
    said = zip(("width", "height"), request.pixels, strict=True)
    width, height = (pixels or limits["defaults"].get(name, 0) for name, pixels in said)
    return width, height


def _count_field(request: Generation) -> str:
    return "n" if request.n is not None else "num_outputs_per_prompt"


def _pixel_problems(request: Generation, limits: dict[str, Any], max_pixels: int, whose: str) -> Problems:
    width, height = _size(request, limits)
    if width * height > max_pixels:
        product = f"{width} x {height} = {width * height}"
        larger = "width" if width >= height else "height"
        side = math.isqrt(max_pixels) // limits["size_multiple"] * limits["size_multiple"]
        yield _said_in(request, larger), f"{product} pixels are more than the {max_pixels} {whose}; {side}x{side} fits"


def _key_problems(request: Generation, limits: dict[str, Any], key: KeyLimits | None) -> Problems:
    """What is within the model's limits and beyond those of the caller's API key."""
    if key is None:
        return
    if key.max_pixels is not None:
        yield from _pixel_problems(request, limits, key.max_pixels, "that the API key's max_pixels allows")
    frames = _frames(request, limits)
    if key.max_frames is not None and frames > key.max_frames:
        yield "num_frames", f"{frames} is more than the {key.max_frames} that the API key's max_frames allows"


def _said_in(request: Generation, name: str) -> str:
    return name if getattr(request, name) is not None or request.size is None else "size"


def _count_problems(request: Generation, limits: dict[str, Any]) -> Problems:
    maxima = {"num_inference_steps": "max_steps", "num_frames": "max_frames"}
    for name, limit in maxima.items():
        value = getattr(request, name)
        if value is not None and value > limits[limit]:
            yield name, f"{shown(value)} is more than {limits[limit]}"
    if request.num_outputs > limits["max_outputs"]:
        yield _count_field(request), f"{shown(request.num_outputs)} is more than {limits['max_outputs']}"
    multiple, frames = limits["frame_multiple"], request.num_frames
    if frames is not None and frames % multiple != 1 % multiple:
        near = frames // multiple * multiple + 1
        yield "num_frames", f"{frames} is not 1 more than a multiple of {multiple}; {near} is"


def _format_problems(request: Generation, output: str) -> Problems:
    if request.modalities is not None and output not in request.modalities:
        yield "modalities", f"{request.modalities} has no {output}, which is what this model makes"
    chosen, formats = request.output_format, FORMATS[output]
    if chosen is not None and chosen not in formats:
        yield "output_format", f"{chosen!r} is no format of this model's output; choose from {', '.join(formats)}"
    if request.output_compression not in (None, 100) and chosen not in ("jpeg", "webp"):
        yield "output_compression", "is for jpeg and webp, which output_format has to name; the others are always whole"
