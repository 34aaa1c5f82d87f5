"""Who is let in: request ids, API keys, their rate, and the audit line, around the whole application."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_ray.api import audit
from omni_ray.api.caller import CALLER, Caller
from omni_ray.api.errors import error_from, error_response
from omni_ray.api.page import FILES
from omni_ray.config.keys import ApiKey, hash_of, read_keys
from omni_ray.errors import Cancelled, ConfigError, OmniRayError, WrongKey

logger = logging.getLogger("ray.serve")

OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/openapi.json", *FILES})
"""What needs no key. `/metrics` needs one, as it tells of everybody's traffic; one with `models: []` will do."""
UNAUDITED_PATHS = frozenset({"/health", "/ready"})
REQUEST_ID = "x-request-id"
LOOK_EVERY_S = 1.0

Count = Callable[[str, int], Awaitable[None]]
"""Counts a request of the key of this name, which may make so many a minute; raises OverLimit."""


class Keys:
    """The keys of a file, read again when it has changed.

    Raises ConfigError if the file is broken at first. If it is broken later, the log says so, and the keys that were
    read before stay in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._keys = read_keys(path)
        self._next_look = time.monotonic() + LOOK_EVERY_S

    def find(self, secret: str) -> ApiKey | None:
        """The key that ``secret`` is, in a time that tells nothing of the keys in the file."""
        self._look()
        digest, found = hash_of(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found

    def _look(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            logger.error("%s; the %d keys that were read before stay in force", error, len(self._keys))

    def _stat(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size


class Access:
    """ASGI middleware. ``keys`` None lets everybody in."""

    def __init__(self, app: ASGIApp, keys: Keys | None, count: Count, audit_prompts: bool) -> None:
        self._app = app
        self._keys = keys
        self._count = count
        self._audit_prompts = audit_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        caller = Caller(exchange.request_id, keeps_prompts=self._audit_prompts)
        token = CALLER.set(caller)
        try:
            await self._answer(exchange, caller)
            if caller.failed:
                exchange.end("failed")
        except asyncio.CancelledError:
            exchange.end("cancelled")
            raise
        except BaseException:
            exchange.end("failed")
            raise
        finally:
            CALLER.reset(token)
            if exchange.path not in UNAUDITED_PATHS:
                exchange.audit(caller)

    async def _answer(self, exchange: _Exchange, caller: Caller) -> None:
        try:
            if self._keys is not None and exchange.path not in OPEN_PATHS:
                caller.key = self._key(Headers(scope=exchange.scope))
                exchange.scope["state"] = {**exchange.scope.get("state", {}), "user": caller.key.name}
                rate = caller.key.limits.requests_per_minute
                if rate is not None and exchange.scope["method"] == "POST":
                    await self._count(caller.key.name, rate)
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status:
                raise
            answer = error_from(error, caller.request_id)
            if type(answer) is OmniRayError:
                logger.exception("request %s failed", caller.request_id)
            headers = {"www-authenticate": "Bearer"} if isinstance(answer, WrongKey) else None
            await error_response(answer, headers)(exchange.scope, exchange.receive, exchange.send)

    def _key(self, headers: Headers) -> ApiKey:
        """The caller's key, as OpenAI's and Anthropic's clients send it."""
        assert self._keys is not None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not secret:
            raise WrongKey(
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
        key = self._keys.find(secret)
        if key is None:
            raise WrongKey("Incorrect API key provided. Ask who runs this server for one.")
        return key


class _Exchange:
    """One request and its answer as they pass: sizes, status and how it ended.

    Whatever looks at the request's headers finds the id in them. Ray Serve sends it back as the answer's
    `X-Request-ID`; so it has to be sent from here only where it is not the one that came.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._started = time.monotonic()
        self._request_bytes = self._response_bytes = 0
        self._outcome = "complete"
        self.status = 0
        self.scope = scope
        self.path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        headers = MutableHeaders(scope=scope)
        came = headers.get(REQUEST_ID)
        self._is_own = came is None or not re.fullmatch(r"[!-~]{1,128}", came)
        self.request_id = str(uuid.uuid4()) if self._is_own or came is None else came
        headers[REQUEST_ID] = self.request_id

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._request_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._is_own:
                MutableHeaders(scope=message)[REQUEST_ID] = self.request_id
        else:
            self._response_bytes += len(message.get("body", b""))
        await self._send(message)

    def end(self, outcome: str) -> None:
        self._outcome = outcome
        self.status = self.status or (Cancelled.status if outcome == "cancelled" else OmniRayError.status)

    def audit(self, caller: Caller) -> None:
        audit.write(
            caller,
            method=self.scope["method"],
            path=self.path,
            status=self.status,
            outcome=self._outcome,
            seconds=time.monotonic() - self._started,
            request_bytes=self._request_bytes,
            response_bytes=self._response_bytes,
        )
