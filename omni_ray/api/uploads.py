"""Forms and input images: what a client uploads, checked before anything is queued for it."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncGenerator, Collection
from typing import Any

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from omni_ray.api.body import read_body
from omni_ray.errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20
"""Of an input image, before it is unpacked."""
MAX_FILES = 16
MAX_FIELDS = 200

Files = dict[str, list[bytes]]


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_form(request: Request, max_bytes: int, file_fields: Collection[str]) -> tuple[dict[str, Any], Files]:
    """Fields and files of a multipart form. ``name[]`` counts as ``name``; a field may be said once.

    :raises RequestError: it cannot be read, a field is said twice, or a file comes in a field that takes none.
    """
    body = await read_body(request, max_bytes)
    parser = MultiPartParser(
        request.headers, _once(body), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max(max_bytes, 1)
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise RequestError(f"the form cannot be read: {getattr(error, 'message', error)}") from None
    try:
        return await _sorted(form, file_fields)
    finally:
        await form.close()


async def _sorted(form: FormData, file_fields: Collection[str]) -> tuple[dict[str, Any], Files]:
    fields: dict[str, Any] = {}
    files: Files = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile):
            if name not in file_fields:
                raise RequestError(f"{name[:80]}: takes no file; files go into {', '.join(file_fields)}", param=name)
            files.setdefault(name, []).append(await value.read())
        elif name in file_fields:
            raise RequestError(f"{name}: is a text, but a file is wanted; give it a filename", param=name)
        elif name in fields:
            raise RequestError(f"{name[:80]}: is said twice", param=name)
        else:
            fields[name] = value
    return fields, files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def typed(value: str) -> object:
    """A form's text as the number or boolean that it spells, for fields that only a pipeline knows."""
    try:
        spelt = from_json(value)
    except ValueError:
        return value
    return spelt if isinstance(spelt, (bool, int, float)) else value


async def check_image(data: bytes, where: str) -> None:
    """RequestError naming ``where`` unless ``data`` is a whole image of a size that can be unpacked."""
    if problem := await asyncio.to_thread(_problem, data):
        raise RequestError(f"{where}: {problem}", param=where)


def _problem(data: bytes) -> str:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} that are taken"
            image.load()
    except UnidentifiedImageError:
        return "is no image; send a PNG, JPEG or WebP"
    except Exception as error:  # Pillow's readers raise all kinds
        return f"cannot be read: {error}; send a whole PNG, JPEG or WebP"
    return ""
