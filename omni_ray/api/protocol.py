"""The bodies that DiT models take, as OpenAI and vLLM-Omni word them, and what is wrong with one that does not fit."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from omni_ray.api.wording import shown
from omni_ray.errors import RequestError

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0)]
Strength = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Previews = Annotated[int, Field(ge=0, le=3)]
Percent = Annotated[int, Field(ge=0, le=100)]
Format = Literal["png", "jpeg", "webp", "mp4"]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Generation(Body):
    """What a request for images or a video may say besides its prompt.

    The arguments of the model's diffusers pipeline go by their own names, at the top level or inside ``extra_body``:
    those listed here, and any other that the model's ``limits.fields`` in `/v1/models` names.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    pipeline_fields: ClassVar[tuple[str, ...]] = (
        "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale",
        "strength", "max_sequence_length", "guidance_scale_2",
    )  # fmt: skip

    model: str = Field(description="A model's name, or `name:profile`.")
    n: Count | None = Field(None, description="How many outputs to make.")
    num_outputs_per_prompt: Count | None = Field(None, description="vLLM-Omni's word for `n`.")
    size: str | None = Field(None, description="`WIDTHxHEIGHT` in pixels, or `auto`.", examples=["256x256"])
    width: Count | None = Field(None, description="In pixels.")
    height: Count | None = Field(None, description="In pixels.")
    num_frames: Count | None = Field(None, description="Frames of a video.")
    negative_prompt: str | None = Field(None, description="What the output should not show.")
    num_inference_steps: Count | None = Field(None, description="Denoise steps.")
    guidance_scale: Scale | None = Field(None, description="How closely to follow the prompt.")
    guidance_scale_2: Scale | None = Field(None, description="`guidance_scale` of the second of two transformers.")
    true_cfg_scale: Scale | None = Field(None, description="Scale of true CFG, with a negative prompt.")
    strength: Strength | None = Field(None, description="Share of the input image to redraw.")
    max_sequence_length: Count | None = Field(None, description="Tokens of the prompt that the text encoder reads.")
    seed: Seed | None = Field(None, description="Equal seeds give equal images; the reply tells it.")
    output_format: Format | None = Field(None, description="`png` is the default, and `mp4` for a video.")
    output_compression: Percent | None = Field(None, description="Quality of JPEG and WebP in percent.")
    modalities: list[Literal["text", "image", "video"]] | None = Field(None, description="Must name what is made.")
    user: str | None = Field(None, description="Accepted, and not used.")

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str | None) -> str | None:
        if size is None or size == "auto" or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", size):
            return size
        raise ValueError(f"{shown(size)} is neither WIDTHxHEIGHT in pixels, such as 1024x1024, nor auto")

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        width, height = self.pixels
        if (self.width or width, self.height or height) != (width, height):
            raise ValueError(f"size {self.size} contradicts width {self.width}, height {self.height}; say one of them")
        if None not in (self.n, self.num_outputs_per_prompt) and self.n != self.num_outputs_per_prompt:
            raise ValueError("n contradicts num_outputs_per_prompt; say one of them")
        return self

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """Width and height, wherever they were said."""
        if self.size is None or self.size == "auto":
            return self.width, self.height
        width, _, height = self.size.partition("x")
        return int(width), int(height)

    @property
    def num_outputs(self) -> int:
        return self.n or self.num_outputs_per_prompt or 1

    @property
    def pipeline_args(self) -> dict[str, Any]:
        """What was said of the pipeline's arguments, the prompt aside."""
        width, height = self.pixels
        said = {name: getattr(self, name) for name in self.pipeline_fields} | {"width": width, "height": height}
        return {name: value for name, value in (said | self.__pydantic_extra__).items() if value is not None}


class ImagesRequest(Generation):
    """`POST /v1/images/generations`"""

    prompt: str = Field(description="What the image shows.", examples=["a red circle"])
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="`url` is a `data:` URL.")
    run_async: bool = Field(False, alias="async", description="Answer at once, with a job that needs no client.")
    partial_images: Previews | None = Field(None, description="How many previews a stream shows.")
    progress: bool = Field(False, description="A stream tells queue place and steps too.")
    quality: Literal["auto", "standard"] | None = Field(None, description="Steps and guidance set the quality.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    style: Literal["natural"] | None = Field(None, description="The prompt says what style is wanted.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is filtered.")
    stream: bool | None = Field(None, description="Send previews, and last the image, as they come.")

    @model_validator(mode="after")
    def _streams_what_it_can(self) -> Self:
        if self.stream and self.run_async:
            raise ValueError("async contradicts stream; /v1/jobs/{id}/events streams a job's progress")
        if self.stream and self.num_outputs > 1:
            raise ValueError(f"n: {self.num_outputs} images cannot be streamed; ask for one")
        return self


class ImageEditRequest(ImagesRequest):
    """`POST /v1/images/edits`, a form with the images as files, or JSON that names them."""

    input_fidelity: Literal["low", "high"] | None = Field(None, description="`strength` says it exactly.")


class ImageVariationRequest(ImageEditRequest):
    """`POST /v1/images/variations`, likewise."""

    prompt: str = Field("", description="What to keep in mind.")


class VideosRequest(Generation):
    """`POST /v1/videos`, as JSON or as a form. `input_reference` is the first frame."""

    prompt: str = Field(description="What the video shows.", examples=["a red circle moving right"])
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = Field(None, description="Length; `num_frames` is exact.")
    fps: Annotated[int, Field(ge=1, le=120)] | None = Field(None, description="Frames a second.")

    @field_validator("seconds", mode="before")
    @classmethod
    def _number(cls, seconds: object) -> object:
        try:
            return float(seconds) if isinstance(seconds, str) else seconds
        except ValueError:
            return seconds


class ImageUrl(Body):
    url: str = Field(description="A `data:` URL with the image in base64.")


class Part(Body):
    type: str = Field(description="`text` or `image_url`.")
    text: str | None = None
    image_url: ImageUrl | None = None


def _kind(content: object) -> str:
    return "str" if isinstance(content, str) else "list"


Content = Annotated[Annotated[str, Tag("str")] | Annotated[list[Part], Tag("list")], Discriminator(_kind)]


class Message(Body):
    role: str
    content: Content | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Generation):
    """`POST /v1/chat/completions` for a DiT model or a chain. The last user message is the prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    partial_images: Previews | None = Field(None, description="How many previews a stream shows.")
    progress: bool = Field(False, description="A stream tells queue place and steps too.")
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = Field(None, description="Accepted, and not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")


G = TypeVar("G", bound=Generation)


def parse(kind: type[G], body: dict[str, Any], *, strict: bool | None = None) -> G:
    """``body`` as a ``kind``; what stands in ``extra_body`` counts as if it stood beside it. A form, where all is text,
    is not ``strict``.

    :raises RequestError: naming every field that does not fit, and as ``param`` the first.
    """
    extra = body.get("extra_body")
    if extra is not None:
        if not isinstance(extra, dict):
            raise RequestError(f"extra_body: {shown(extra)} is not an object", param="extra_body")
        if twice := sorted(name for name in extra if name in body and body[name] != extra[name]):
            problem = "extra_body says something else than the body itself; say it once"
            raise RequestError(f"{twice[0]}: {problem}", param=twice[0])
        body = {name: value for name, value in body.items() if name != "extra_body"} | extra
    try:
        return kind.model_validate(body, strict=strict)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise RequestError("; ".join(map(_sentence, details)), param=_field(details[0]) or None) from None


def _field(detail: ErrorDetails) -> str:
    """Such as ``messages.0.content``; tags of unions are no part of what the client wrote."""
    return ".".join(str(item) for item in detail["loc"] if item not in ("str", "list"))


def _sentence(detail: ErrorDetails) -> str:
    field, problem = _field(detail), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{field} is missing"
    if detail["type"] == "value_error":
        return f"{field}: {problem}" if field else problem
    return f"{field}: {problem[0].lower()}{problem[1:]}, not {shown(detail['input'])}"
