"""How long the answers of an AR model may be for the caller's API key."""

from __future__ import annotations

from typing import Any

from omni_ray.api import caller
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError

FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""What says how many tokens an answer may have; of two, vLLM reads the first that is there."""

DEFAULTS = {"/v1/completions": 16}
"""What it is where nothing says so; elsewhere as many as fit."""

NEEDED = frozenset({"/v1/messages"})
"""Where vLLM refuses a body without it."""


def bound_of(path: str, body: dict[str, Any]) -> tuple[str, int] | None:
    """The field that a body leaves open, and the most that it may be by the ``max_tokens`` of the caller's key; None
    where there is no such limit, or the body keeps to it.

    Raises RequestError where it asks for more.
    """
    bounds = caller.limits()
    if bounds is None or bounds.max_tokens is None or path not in FIELDS:
        return None
    num = max(_whole(body, "n", 1), 1) * _num_prompts(body)
    field = next((name for name in FIELDS[path] if body.get(name) is not None), None)
    asked = 1 if field is None else _whole(body, field, 1)
    if num * asked > bounds.max_tokens:
        param = field or "n"
        times = f"{num} x " if num > 1 else ""
        problem = f"{times}{asked} tokens are more than the {bounds.max_tokens} that the API key's max_tokens allows"
        raise RequestError(f"{param}: {problem}", param=param)
    if field is not None or path in NEEDED:
        return None
    each = bounds.max_tokens // num
    return FIELDS[path][0], min(each, DEFAULTS.get(path, each))


def _num_prompts(body: dict[str, Any]) -> int:
    """A completion may have several: lists of texts, of lists of tokens, or of embeddings."""
    lists = [body[name] for name in ("prompt", "prompt_embeds") if isinstance(body.get(name), list)]
    return max(1, sum(len(each) for each in lists if each and not isinstance(each[0], int)))


def _whole(body: dict[str, Any], name: str, default: int) -> int:
    value = default if body.get(name) is None else body[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}: {shown(value)} is no whole number", param=name)
    return value
