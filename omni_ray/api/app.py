"""The ingress: one table of routes, and the choice of who answers by the type of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from omni_ray import __version__
from omni_ray.api import audit
from omni_ray.api.access import Access, Keys
from omni_ray.api.answers import bound_of
from omni_ray.api.background import Background
from omni_ray.api.body import model_name, parse_object, read_body
from omni_ray.api.chat import chat_with_drawer
from omni_ray.api.directory import Directory
from omni_ray.api.docs import AR_BODY, body_of, describe, form_of, ref
from omni_ray.api.errors import answer_error
from omni_ray.api.forward import PATHS, Forwarder
from omni_ray.api.images import Images
from omni_ray.api.inputs import read_fields, read_images
from omni_ray.api.jobs import Jobs
from omni_ray.api.limits import Inputs
from omni_ray.api.media import Fetcher
from omni_ray.api.meters import UNCOUNTED, Measured
from omni_ray.api.metrics import metrics
from omni_ray.api.models import Models
from omni_ray.api.page import add_page
from omni_ray.api.pipeline import Drawer
from omni_ray.api.protocol import (
    ChatRequest,
    ImageEditRequest,
    ImagesRequest,
    ImageVariationRequest,
    VideosRequest,
    parse,
)
from omni_ray.api.stored_jobs import StoredJobs
from omni_ray.api.submission import Submission
from omni_ray.api.videos import Videos
from omni_ray.config.spec import OmniSpec, Pipeline
from omni_ray.errors import OmniRayError, RequestError
from omni_ray.store.store import Store
from omni_ray.watch import look_after_neighbours

EDIT_FILES, VARIATION_FILES, VIDEO_FILES = ("image", "mask"), ("image",), ("input_reference",)


@serve.ingress()
class Api:
    """``router`` is the router's handle, ``ar_handles`` are those of the AR groups by group id."""

    def __init__(
        self, spec: OmniSpec, router: DeploymentHandle[Any], ar_handles: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        look_after_neighbours()
        chains = {model.id: model for model in spec.models if isinstance(model, Pipeline)}
        self._max_body_bytes = int(spec.api.max_body_mib * 2**20)
        self._audit_prompts = spec.api.audit_prompts
        self._keys = Keys(Path(spec.api.keys_file).expanduser()) if spec.api.keys_file else None
        self._fetcher = Fetcher(spec.api)
        self._router = router
        self._directory = Directory(router)
        self._forwarder = Forwarder(ar_handles, self._directory)
        self._drawer = Drawer(chains, self._directory, self._forwarder, Jobs(router, self._directory))
        self._background = Background(router, self._directory, Store(spec.jobs))
        self._images = Images(self._drawer, self._background)
        audit.log_to_file()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="omni_ray", version=__version__, description="AR and diffusion models behind one endpoint.")
        for kind in (OmniRayError, HTTPException, Exception):
            app.add_exception_handler(kind, answer_error)
        app.add_middleware(Measured)
        self._add_routes(app)
        describe(app)
        app.add_middleware(Access, keys=self._keys, count=self._count, audit_prompts=self._audit_prompts)
        return app

    async def _count(self, key: str, requests_per_minute: int) -> None:
        """Asks the router: a share of the limit per ingress replica would be wrong wherever a client's connection stays
        with one of them. Only requests of keys with such a limit pay for the call."""
        await self._router.count.remote(key, requests_per_minute)

    def _add_routes(self, app: FastAPI) -> None:
        models = Models(self._directory)
        post: dict[str, Any] = {"methods": ["POST"], "tags": ["inference"]}
        get: dict[str, Any] = {"methods": ["GET"]}
        app.add_api_route("/v1/chat/completions", self.chat, **post, openapi_extra=body_of(AR_BODY, ref(ChatRequest)))
        app.add_api_route("/v1/images/generations", self.images, **post, openapi_extra=body_of(ref(ImagesRequest)))
        app.add_api_route("/v1/images/edits", self.edits, **post, openapi_extra=form_of(ImageEditRequest, EDIT_FILES))
        app.add_api_route(
            "/v1/images/variations",
            self.variations,
            **post,
            openapi_extra=form_of(ImageVariationRequest, VARIATION_FILES),
        )
        for path in PATHS:
            app.add_api_route(path, self.forward, **post, name=path, openapi_extra=body_of(AR_BODY))
        self._add_job_routes(app)
        app.add_api_route("/v1/models", models.models, **get, tags=["models"])
        app.add_api_route("/v1/models/{name:path}", models.model, **get, tags=["models"])
        app.add_api_route("/health", models.health, **get, tags=[UNCOUNTED])
        app.add_api_route("/ready", models.ready, **get, tags=[UNCOUNTED])
        app.add_api_route("/metrics", metrics, **get, tags=[UNCOUNTED])
        add_page(app)

    def _add_job_routes(self, app: FastAPI) -> None:
        videos = Videos(self._directory, self._drawer, self._background, self._fetcher, self._max_body_bytes)
        jobs = StoredJobs(self._background)
        tags: dict[str, Any] = {"tags": ["jobs"]}
        created = form_of(VideosRequest, VIDEO_FILES)
        app.add_api_route("/v1/videos", videos.create, methods=["POST"], **tags, openapi_extra=created)
        app.add_api_route("/v1/videos/sync", videos.create_and_wait, methods=["POST"], **tags, openapi_extra=created)
        for path, one in (("/v1/videos", videos), ("/v1/jobs", jobs)):
            app.add_api_route(path, one.page, methods=["GET"], **tags)
            app.add_api_route(path + "/{job_id}", one.get, methods=["GET"], **tags)
            app.add_api_route(path + "/{job_id}", one.delete, methods=["DELETE"], **tags)
            app.add_api_route(path + "/{job_id}/content", one.content, methods=["GET"], **tags)
        app.add_api_route("/v1/jobs/{job_id}/cancel", jobs.cancel, methods=["POST"], **tags)
        app.add_api_route("/v1/jobs/{job_id}/events", jobs.events, methods=["GET"], **tags)

    async def chat(self, request: Request) -> Response:
        """AR models answer as vLLM does. DiT models and chains draw what the last user message says."""
        raw = await read_body(request, self._max_body_bytes)
        body = parse_object(raw)
        route = await self._directory.open(model_name(body))
        is_changed = await self._fetcher.inline(body)
        if route.type == "ar":
            return await self._speak(route.group, request, raw, body, is_changed=is_changed)
        return await chat_with_drawer(self._drawer, route, body, Submission.of(request).request_id)

    async def images(self, request: Request) -> Response:
        """DiT models and chains draw the prompt."""
        body = parse_object(await read_body(request, self._max_body_bytes))
        route = await self._directory.open_to_draw(model_name(body))
        asked = parse(ImagesRequest, body)
        inputs = Inputs(prompt=asked.prompt)
        return await self._images.answer(route, asked, inputs, Submission.of(request), "image_generation")

    async def edits(self, request: Request) -> Response:
        """DiT models draw the prompt from the images, and where there is a mask inside it."""
        return await self._edit(request, ImageEditRequest, EDIT_FILES, "image_edit")

    async def variations(self, request: Request) -> Response:
        """DiT models draw the image anew, with or without a prompt."""
        return await self._edit(request, ImageVariationRequest, VARIATION_FILES, "image_variation")

    async def _edit(
        self, request: Request, kind: type[ImageEditRequest], file_fields: tuple[str, ...], event_type: str
    ) -> Response:
        uploaded = await read_fields(request, kind, file_fields, self._max_body_bytes)
        route = await self._directory.open_to_draw(model_name(uploaded.fields))
        files = await read_images(uploaded, file_fields, self._fetcher)
        asked = parse(kind, uploaded.fields, strict=uploaded.strict)
        inputs = Inputs(
            prompt=asked.prompt,
            images=tuple(files.get("image", ())),
            mask=next(iter(files.get("mask", ())), None),
            needs_prompt=kind is ImageEditRequest,
            needs_image=True,
        )
        return await self._images.answer(route, asked, inputs, Submission.of(request), event_type)

    async def forward(self, request: Request) -> Response:
        """AR models answer as vLLM does."""
        raw = await read_body(request, self._max_body_bytes)
        body = parse_object(raw)
        route = await self._directory.open(model_name(body))
        if route.type != "ar":
            raise RequestError(f"{route.name} draws; use /v1/chat/completions or /v1/images/generations", param="model")
        is_changed = await self._fetcher.inline(body)
        return await self._speak(route.group, request, raw, body, is_changed=is_changed)

    async def _speak(
        self, group: str, request: Request, raw: bytes, body: dict[str, Any], *, is_changed: bool
    ) -> Response:
        """A body that has not changed goes on as it came."""
        bound = bound_of(request.scope["path"], body)
        raw = to_json(body, inf_nan_mode="constants") if is_changed else raw
        return await self._forwarder.forward(group, request, raw, bound)
