"""How long the answers of an AR model may be for the caller's API key."""

from __future__ import annotations

from typing import Any

from omni_ray.api import caller
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError

Fields = tuple[tuple[str, ...], int | None]
"""What says how many tokens an answer may have, and how many it has where nothing does; None: as many as fit."""

FIELDS: dict[str, Fields] = {
    "/v1/chat/completions": (("max_completion_tokens", "max_tokens"), None),
    "/v1/completions": (("max_tokens",), 16),
    "/v1/responses": (("max_output_tokens",), None),
    "/v1/messages": (("max_tokens",), None),
}


def limit_answer(path: str, body: dict[str, Any]) -> bool:
    """Hold a body against the ``max_tokens`` of the caller's key. One that leaves the length open gets it written in:
    then this is true.

    Raises RequestError where it asks for more.
    """
    bounds = caller.limits()
    if bounds is None or bounds.max_tokens is None or path not in FIELDS:
        return False
    names, default = FIELDS[path]
    num_answers = max(_whole(body, "n", 1), 1) * _num_prompts(body)
    asked = {name: _whole(body, name, 0) for name in names if body.get(name) is not None}
    if not asked and default is None and num_answers <= bounds.max_tokens:
        body[names[0]] = bounds.max_tokens // num_answers
        return True
    for name, tokens in asked.items() or [(names[0], default or 1)]:
        if num_answers * tokens > bounds.max_tokens:
            times = f"{num_answers} x " if num_answers > 1 else ""
            problem = f"{times}{tokens} tokens are more than the {bounds.max_tokens}"
            raise RequestError(f"{name}: {problem} that the API key's max_tokens allows", param=name)
    return False


def _num_prompts(body: dict[str, Any]) -> int:
    """A completion may have several: a list of texts, or of lists of tokens."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _whole(body: dict[str, Any], name: str, default: int) -> int:
    value = default if body.get(name) is None else body[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}: {shown(value)} is no whole number", param=name)
    return value
