"""Bytes in, bytes out: decodes input images, encodes what a pipeline returns as PNG, JPEG, WebP or MP4."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from omni_ray.errors import RequestError
from omni_ray.messages import FPS, Job, Media

PREVIEW_QUALITY = 80
"""Of a preview in JPEG or WebP, in percent, at most."""


def decode_image(data: bytes) -> Image.Image:
    """An RGB image from encoded bytes; RequestError if they are no image."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError) as error:
        raise RequestError(f"the input image cannot be read: {error}; send PNG, JPEG or WebP", param="image") from error


def blank_image(size: tuple[int, int]) -> bytes:
    """A white PNG, of so many pixels across and down."""
    return encode_image(Image.new("RGB", size, "white"), "png", 100)


def decode_mask(data: bytes) -> Image.Image:
    """White where to draw anew: OpenAI's masks say so by being transparent, those of others by being white."""
    mask = Image.open(io.BytesIO(data))
    if "A" in mask.getbands() or "transparency" in mask.info:
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def encode_outputs(output: Any, job: Job) -> Iterator[Media]:
    """Each image or video of a pipeline's output object, encoded in the job's format."""
    if (frames := getattr(output, "frames", None)) is not None:
        for index, clip in enumerate(frames):
            array = np.stack([np.asarray(frame) for frame in clip])
            yield _media(job, index, encode_video(array, job.fps or FPS), array.shape, "mp4")
        return
    for index, image in enumerate(output.images):
        data = encode_image(image, job.format, job.compression)
        yield _media(job, index, data, (1, image.height, image.width), job.format)


def encode_preview(output: Any, job: Job) -> Iterator[Media]:
    """The first image of a pipeline's output, or the first frame, at the size that the job asks for."""
    image = output.images[0] if getattr(output, "frames", None) is None else output.frames[0][0]
    if not isinstance(image, Image.Image):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    size = job.params.get("width", image.width), job.params.get("height", image.height)
    format = "jpeg" if job.format == "mp4" else job.format
    data = encode_image(image.resize(size), format, min(job.compression, PREVIEW_QUALITY))
    yield _media(job, 0, data, (1, size[1], size[0]), format)


def encode_image(image: Image.Image, format: str, compression: int) -> bytes:
    """``compression`` is the quality of JPEG and WebP in percent, as OpenAI defines it; PNG is always lossless."""
    buffer = io.BytesIO()
    fast = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # smaller files of photographs, larger ones of text
    options: dict[str, Any] = fast if format == "png" else {"quality": compression}
    image.save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, fps: int = FPS) -> bytes:
    """H.264 in MP4 from frames ``[F, H, W, 3]``, uint8 or float in 0..1."""
    import av

    frames = eight_bits(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def eight_bits(colours: np.ndarray) -> np.ndarray:
    """Colours of 0..255 from such, or from floats of 0..1."""
    return colours if colours.dtype == np.uint8 else (colours.clip(0, 1) * 255).round().astype(np.uint8)


def _media(job: Job, index: int, data: bytes, shape: tuple[int, ...], format: Any) -> Media:
    return Media(
        job_id=job.id, index=index, format=format, data=data, num_frames=shape[0], height=shape[1], width=shape[2]
    )
