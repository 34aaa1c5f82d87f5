"""What ``/docs`` shows of the bodies: they are checked by hand, so FastAPI cannot read them from the signatures."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from omni_ray.api.inputs import KEYS, ONE
from omni_ray.api.protocol import (
    ChatRequest,
    ImageEditRequest,
    ImagesRequest,
    ImageVariationRequest,
    VideosRequest,
)

BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    ImagesRequest,
    ImageEditRequest,
    ImageVariationRequest,
    VideosRequest,
)
REF = "#/components/schemas/{model}"
NAMED = {
    "type": "object",
    "required": ["image_url"],
    "properties": {"image_url": {"type": "string", "description": "An allowed https URL, or a `data:` URL."}},
}
SEVERAL = {"type": "array", "items": NAMED}
AR_BODY = {"type": "object", "required": ["model"], "description": "As `vllm serve` takes it."}


def body_of(*schemas: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's ``openapi_extra`` for an endpoint whose JSON body is one of ``schemas``."""
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_of(model: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    """The same for a form with the fields of ``model`` and these files, or JSON that names them by URL."""
    properties = {
        "multipart/form-data": {name: {"type": "string", "format": "binary"} for name in files},
        "application/json": {KEYS[name]: NAMED if name in ONE else {"anyOf": [NAMED, SEVERAL]} for name in files},
    }
    content = {
        kind: {"schema": {"allOf": [ref(model), {"type": "object", "properties": images}]}}
        for kind, images in properties.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def ref(model: type) -> dict[str, Any]:
    return {"$ref": REF.format(model=model.__name__)}


def describe(app: FastAPI) -> None:
    """Make ``app`` tell the models that :func:`ref` points to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, models = models_json_schema([(body, "validation") for body in BODIES], ref_template=REF)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
