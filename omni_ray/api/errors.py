"""The one place where an exception becomes an HTTP status and an OpenAI error object."""

from __future__ import annotations

import math

from fastapi import Request, Response
from pydantic_core import to_json
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from omni_ray.api.wording import shown
from omni_ray.errors import Cancelled, OmniRayError, Overloaded, RequestError, Unavailable

LOST = (RayActorError, ObjectLostError, Unavailable)
"""What a call raises when the replica that ran it died: another replica may do the work."""


class UnknownPath(RequestError):
    status = 404
    type = "not_found_error"
    code = "unknown_path"


class WrongMethod(RequestError):
    status = 405
    code = "method_not_allowed"


def error_from(error: BaseException, request_id: str = "") -> OmniRayError:
    """``error`` as one of ours. What nobody foresaw becomes a 500 that tells the request's id and nothing else."""
    if isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, OmniRayError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("too many requests wait for this model; send it again a little later", retry_after_s=1.0)
    if isinstance(error, LOST):
        return Unavailable("the replica that ran this request died; send it again")
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("the model failed to start; the server's log says why")
    if isinstance(error, ClientDisconnect):
        return Cancelled("the client closed the connection")
    return OmniRayError(f"the server failed at this request; its log tells more under request id {request_id}")


async def answer_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of every exception."""
    if isinstance(error, HTTPException):
        return error_response(_routing_error(request, error), error.headers)
    return error_response(error_from(error, request.headers.get("x-request-id", "")))


def error_response(error: OmniRayError, headers: object = None) -> Response:
    response = Response(to_json(error.body()), status_code=error.status, media_type="application/json")
    if isinstance(headers, dict):
        response.headers.update(headers)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return response


def _routing_error(request: Request, error: HTTPException) -> OmniRayError:
    path = shown(request.url.path)
    if error.status_code == 404:
        return UnknownPath(f"there is no {path}; /docs lists the paths")
    if error.status_code == 405:
        return WrongMethod(f"{path} does not take {request.method}; /docs lists the methods")
    return RequestError(str(error.detail))
