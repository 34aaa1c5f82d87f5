"""AR requests: the body goes to a replica of the group as it came, the answer comes back as vLLM words it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request, Response
from ray.serve.handle import DeploymentHandle

from omni_ray.api import sse
from omni_ray.api.calls import call, items
from omni_ray.api.directory import Directory
from omni_ray.messages import HttpHead, HttpRequest

PATHS = (
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v2/embed",
    "/v2/rerank",
    "/score",
    "/rerank",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
)
"""Where vLLM takes a JSON body that names a model, besides ``/v1/chat/completions``. Its paths that change the engine
(``/sleep``, ``/v1/load_lora_adapter``, ...) reach one replica only, and are not served."""

HOP_HEADERS = frozenset(
    {"connection", "content-length", "date", "expect", "host", "keep-alive", "server", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
"""What describes one connection and not the message."""
SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})
"""What is for the ingress alone."""


class Forwarder:
    """``handles`` are those of the AR groups, by group id."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]], directory: Directory) -> None:
        self._http = {group: handle.options(method_name="http", stream=True) for group, handle in handles.items()}
        self._directory = directory

    async def forward(
        self, group: str, request: Request, body: bytes, bound: tuple[str, int] | None = None
    ) -> Response:
        """The replica's answer; as a stream if it is one, and then after its first piece."""
        return await self.send(group, _message(request, body, bound))

    async def send(self, group: str, message: HttpRequest) -> Response:
        """As :meth:`forward`, for a request that is no client's."""
        return await call(self._directory, group, lambda: self._attempt(group, message))

    async def _attempt(self, group: str, message: HttpRequest) -> Response:
        pieces: AsyncGenerator[Any, None] = items(self._http[group].remote(message))
        head: HttpHead = await anext(pieces)
        headers = _raw(head)
        if any(n == b"content-type" and v.startswith(sse.CONTENT_TYPE) for n, v in headers):
            return sse.EventStream(pieces, head.status, headers)
        response = Response(b"".join([piece async for piece in pieces]), head.status)
        response.raw_headers += headers
        return response


def _message(request: Request, body: bytes, bound: tuple[str, int] | None) -> HttpRequest:
    query = f"?{request.url.query}" if request.scope["query_string"] else ""
    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in request.scope["headers"]]
    kept = tuple([(n, v) for n, v in headers if n not in HOP_HEADERS | SECRET_HEADERS])
    return HttpRequest(method=request.method, path=request.scope["path"] + query, headers=kept, body=body, bound=bound)


def _raw(head: HttpHead) -> list[tuple[bytes, bytes]]:
    """The headers to send on, without the request id: Ray Serve puts that on every answer."""
    lowered = [(name.lower(), value) for name, value in head.headers]
    return [(n.encode("latin-1"), v.encode("latin-1")) for n, v in lowered if n not in HOP_HEADERS | {"x-request-id"}]
