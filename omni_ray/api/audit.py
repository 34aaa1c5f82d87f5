"""The audit log: a JSON object per request, through the logger ``omni_ray.audit``, without prompts unless asked.

Inside Ray Serve it goes to ``logs/serve/audit_REPLICA.log`` of Ray's session folder, on the node of each ingress.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.exceptions import RayServeException

from omni_ray.api.caller import Caller

logger = logging.getLogger("omni_ray.audit")

MAX_FILE_BYTES = 100 * 2**20
NUM_OLD_FILES = 10
PROMPT_KEYS = (
    "prompt", "negative_prompt", "suffix", "messages", "input", "instructions", "system", "query", "queries",
    "documents", "text_1", "text_2", "data_1", "data_2",
)  # fmt: skip
JOB_KEYS = ("width", "height", "num_frames", "num_inference_steps")
MAX_TEXT_CHARS = 32768
MAX_DATA_URL_CHARS = 48


def log_to_file() -> None:
    """Give the logger its file. Outside Ray Serve it stays as the process has set it."""
    try:
        replica = serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return
    folder = Path(get_serve_logs_dir())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"audit_{replica}.log"
    handler = RotatingFileHandler(file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, delay=True)
    os.close(os.open(file, os.O_CREAT | os.O_APPEND, 0o600))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def write(
    caller: Caller,
    *,
    method: str,
    path: str,
    status: int,
    outcome: str,
    seconds: float,
    request_bytes: int,
    response_bytes: int,
) -> None:
    """One line. ``outcome`` is `complete`, `cancelled` when the client left, or `failed` after the status was sent;
    ``seconds`` are those until then. ``job`` is what of it the request said, for a model that draws."""
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": caller.request_id,
        "key": caller.key.name if caller.key else None,
        "method": method,
        "path": path,
        "model": caller.model,
        "status": status,
        "outcome": outcome,
        "seconds": round(seconds, 4),
        "request_bytes": request_bytes,
        "response_bytes": response_bytes,
    }
    if caller.job is not None:
        said = {key: caller.job.params[key] for key in JOB_KEYS if key in caller.job.params}
        line["job"] = {"id": caller.job.id, "num_outputs": caller.job.num_outputs, **said}
    if caller.keeps_prompts:
        line["prompts"] = {key: _cut(caller.body[key]) for key in PROMPT_KEYS if key in caller.body}
        line["prompts"] |= {"drawn": _cut(caller.drawn)} if caller.drawn else {}
    logger.info(to_json(line, inf_nan_mode="constants").decode())


def _cut(value: Any) -> Any:
    """Without the media in it, and without the end of what is very long."""
    if isinstance(value, str):
        return value[: MAX_DATA_URL_CHARS if value.startswith("data:") else MAX_TEXT_CHARS]
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return {key: _cut(item) for key, item in value.items()} if isinstance(value, dict) else value
