"""Keeps the log of a process when a library sets up its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """`logging.config.dictConfig`, which vLLM calls as it is imported and started, closes all handlers that there
    are. Ray Serve's would write nothing more, and a controller that comes back after a failure would stop the replica.
    """
    known: list[Any] = logging._handlerList  # type: ignore[attr-defined]
    before = known[:]
    known.clear()
    try:
        yield
    finally:
        known[:0] = before
