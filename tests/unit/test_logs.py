"""The log of a replica outlives vLLM's import."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers

from omni_ray.replica.logs import handlers_kept


def test_a_library_that_sets_up_its_log_closes_no_other() -> None:
    target = logging.NullHandler()
    kept = logging.handlers.MemoryHandler(10, target=target)
    with handlers_kept():
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert kept.target is target
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert kept.target is None  # so that without it would
