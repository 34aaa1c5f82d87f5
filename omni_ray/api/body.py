"""Reads a request's body up to the limit, and parses it as one JSON object."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json

from omni_ray.api import caller
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError, TooLarge


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; TooLarge as soon as it is known to exceed ``max_bytes``, without holding more than that."""
    length = int(request.headers.get("content-length", 0))
    if length > max_bytes:
        raise _too_large(max_bytes)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. NaN and Infinity pass here, so that the field's own check can name the field."""
    try:
        value = from_json(body)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}; send one JSON object") from None
    if not isinstance(value, dict):
        raise RequestError(f'the body is JSON, but {shown(value)} is not an object; send one like {{"model": ...}}')
    caller.note_body(value)
    return value


def model_name(body: dict[str, Any]) -> str:
    """What ``model`` says."""
    name = body.get("model")
    if name is None:
        raise RequestError("model is missing; /v1/models lists the choices", param="model")
    if not isinstance(name, str):
        raise RequestError(f"model: {shown(name)} is not a string; /v1/models lists the choices", param="model")
    return name


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body is longer than the {max_bytes} bytes that are taken; send less, or raise api.max_body_mib"
    )
