"""Bodies with input images: a form that has them as files, or JSON that names them by URL, as OpenAI words both."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from omni_ray.api.body import parse_object, read_body
from omni_ray.api.media import Fetcher
from omni_ray.api.uploads import Files, check_image, is_form, read_form, typed
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError

KEYS = {"image": "images", "mask": "mask", "input_reference": "input_reference"}
"""For each file of a form, the key of a JSON body that has an object with an ``image_url``, or a list of such."""
ONE = ("mask",)
"""Files of which there may be one."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The fields of a body, and its files by field. Those of JSON have the types that they should have (``strict`` is
    None), those of a form are texts (False)."""

    fields: dict[str, Any]
    files: Files = field(default_factory=dict)
    strict: bool | None = None


async def read_fields(
    request: Request, kind: type[BaseModel], file_fields: Collection[str], max_bytes: int
) -> Uploaded:
    """The body as ``kind`` will take it. RequestError where it is neither a form nor JSON."""
    if not is_form(request):
        return Uploaded(parse_object(await read_body(request, max_bytes)))
    texts, files = await read_form(request, max_bytes, file_fields)
    fields = {name: text if name in kind.model_fields else typed(text) for name, text in texts.items()}
    return Uploaded(fields, files, strict=False)


async def read_images(uploaded: Uploaded, file_fields: Collection[str], fetcher: Fetcher) -> Files:
    """The images, by the file field of the form: its files, or what the JSON names, which is taken out of its fields.

    Raises RequestError, naming the field, where one is no image, must not be fetched, or is one too many.
    """
    files = uploaded.files
    if uploaded.strict is None:
        await fetcher.inline(uploaded.fields)
        wanted = {name: uploaded.fields.pop(KEYS[name], None) for name in file_fields}
        files = {name: _images(value, KEYS[name]) for name, value in wanted.items() if value is not None}
    for name, images in files.items():
        if name in ONE and len(images) > 1:
            raise RequestError(f"{name}: there are {len(images)}, but one is taken", param=name)
        for image in images:
            await check_image(image, name if uploaded.strict is False else KEYS[name])
    return files


def _images(value: object, key: str) -> list[bytes]:
    if isinstance(value, list):
        return [image for i, item in enumerate(value) for image in _images(item, f"{key}.{i}")]
    url = value.get("image_url") if isinstance(value, dict) else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        wanted = '{"image_url": "https://…"}, or with a data: URL'
        raise RequestError(f"{key}: {shown(value)} names no image; give {wanted}", param=key)
    return [from_data_url(url, f"{key}.image_url")]


def from_data_url(url: str, where: str) -> bytes:
    """What ``url`` holds; RequestError naming ``where`` if it is no ``data:`` URL in base64."""
    head, comma, data = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        problem = "is neither an http or https URL nor a data: URL in base64"
        raise RequestError(f"{where}: {shown(url)} {problem}", param=where)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(f"{where}: the base64 is broken: {error}", param=where) from None
