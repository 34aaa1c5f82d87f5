"""Every error that a person can meet, one class per HTTP status.

OmniRayError                500  server_error
|- ConfigError               -   the YAML asks for something that cannot be served
|- RequestError             400  invalid_request_error
|  |- WrongKey              401  invalid_request_error, invalid_api_key
|  |- NotAllowed            403  invalid_request_error
|  |- UnknownModel          404  not_found_error
|  `- TooLarge              413  invalid_request_error
|- Overloaded               429  rate_limit_error, with Retry-After
|  `- OverLimit             429  rate_limit_error, rate_limit_exceeded
|- Cancelled                499  request_cancelled
|- EngineFailed             500  server_error
`- Unavailable              503  service_unavailable: the engine died or is still loading
"""

from __future__ import annotations

from typing import Any


class OmniRayError(Exception):
    """Base class. ``message`` says where, what came, what was needed and what to change."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)

    def body(self) -> dict[str, Any]:
        """The OpenAI error object: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(cls: type[OmniRayError], message: str, param: str | None, retry_after_s: float | None) -> OmniRayError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class ConfigError(OmniRayError):
    """The configuration cannot be served as written."""


class RequestError(OmniRayError):
    status = 400
    type = "invalid_request_error"


class WrongKey(RequestError):
    """No API key came with the request, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class NotAllowed(RequestError):
    """The API key may not use this model. The code is OpenAI's."""

    status = 403
    code = "model_not_found"


class UnknownModel(RequestError):
    status = 404
    type = "not_found_error"
    code = "model_not_found"


class TooLarge(RequestError):
    status = 413
    code = "request_too_large"


class Overloaded(OmniRayError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class OverLimit(Overloaded):
    """The API key has used up one of its limits."""

    code = "rate_limit_exceeded"


class Cancelled(OmniRayError):
    status = 499
    type = "request_cancelled"
    code = "cancelled"


class EngineFailed(OmniRayError):
    """The engine could not compute this request; other requests are unharmed."""

    code = "engine_failed"


class Unavailable(OmniRayError):
    """No replica can take the request now: it died, or it is still loading."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


def without_traceback(message: str) -> str:
    """The error at the end of a traceback, which begins after the last indented line; other messages as they are."""
    lines = message.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  ")] if '\n  File "' in message else []
    return "\n".join(lines[frames[-1] + 1 :]) if frames else message.strip()
