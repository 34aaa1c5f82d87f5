"""The page at ``/``: a few static files, read once, with headers that let nothing else run or load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response

FOLDER = Path(__file__).with_name("playground")
FILES = {
    "/": ("index.html", "text/html"),
    "/playground/page.css": ("page.css", "text/css"),
    "/playground/page.js": ("page.js", "text/javascript"),
    "/playground/panel.js": ("panel.js", "text/javascript"),
    "/playground/requests.js": ("requests.js", "text/javascript"),
}
"""By path: the file, and what it is."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page. It is no part of the API, so no document lists it."""
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _sender((FOLDER / name).read_bytes(), kind), methods=["GET"], include_in_schema=False)


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
