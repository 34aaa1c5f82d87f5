"""Reads answers: counts what is in them, and notes when it came."""

from __future__ import annotations

import time
from typing import Any

from pydantic_core import from_json

from benchmarks.serving.outcome import Estimate, Outcome


class Refused(Exception):
    """The answer came and is no success; the text is the cause."""


class Forecast:
    """The first estimates that a request is told, held against what happens."""

    def __init__(self) -> None:
        self._told_start: tuple[float, float] | None = None
        self._told_end: tuple[float, float] | None = None
        self.start: Estimate | None = None

    def tell(self, progress: dict[str, Any]) -> None:
        """A progress event or a job: `state` or `status`, and `start_s` and `seconds_left` in so far as it has them."""
        now = time.monotonic()
        state, start_s, left_s = progress.get("state"), progress.get("start_s"), progress.get("seconds_left")
        if self._told_start is None and state == "queued" and start_s is not None:
            self._told_start = (now, start_s)
        if self.start is None and state == "running" and self._told_start is not None:
            told_at, told_s = self._told_start
            self.start = Estimate(told_s, now - told_at)
        unfinished = state is not None or progress.get("status") in ("queued", "in_progress")
        if self._told_end is None and unfinished and left_s is not None:
            self._told_end = (now, left_s)

    def end(self) -> Estimate | None:
        """Called when the request has ended."""
        if self._told_end is None:
            return None
        told_at, told_s = self._told_end
        return Estimate(told_s, time.monotonic() - told_at)


class Reader:
    """Takes the events of a stream, or a whole answer, into an outcome. ``sent`` is when the request was sent."""

    def __init__(self, outcome: Outcome, sent: float) -> None:
        self._outcome = outcome
        self.sent = sent
        self._last: float | None = None
        self._num_events = 0
        self._has_usage = False
        self.forecast = Forecast()

    def event(self, data: bytes, now: float) -> None:
        """One event of a stream; Refused if it is an error."""
        chunk = from_json(data)
        if error := chunk.get("error"):
            raise Refused(f"error in the stream: {_cause(error)}")
        kind = chunk.get("type", "")
        progress = chunk if kind.endswith(".progress") else chunk.get("omni")
        if isinstance(progress, dict) and "seconds_left" in progress:
            self.forecast.tell(progress)
        if kind.endswith((".partial_image", ".completed")):
            self._content(now)
            self._outcome.num_outputs += kind.endswith(".completed")
        elif choices := chunk.get("choices"):
            delta = choices[0].get("delta") or {}
            if content := delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
                self._content(now)
                self._num_events += isinstance(content, str)
                self._count_images(content)
        if usage := chunk.get("usage"):
            self._usage(usage)

    def whole(self, body: bytes) -> None:
        """A whole answer; Refused if nothing is in it."""
        answer = from_json(body)
        if choices := answer.get("choices"):
            self._count_images(choices[0]["message"].get("content"))
        self._outcome.num_outputs += len(answer.get("data") or ())
        self._usage(answer.get("usage") or {})
        if not choices and not self._outcome.num_outputs:
            raise Refused("nothing in the answer")

    def end(self) -> None:
        """A stream has ended; Refused if nothing came."""
        if self._last is None:
            raise Refused("nothing in the stream")
        if not self._has_usage:
            self._outcome.num_tokens = self._num_events

    def _content(self, now: float) -> None:
        if self._last is None:
            self._outcome.first_s = now - self.sent
        else:
            self._outcome.gaps_s.append(now - self._last)
        self._last = now

    def _count_images(self, content: Any) -> None:
        if isinstance(content, list):
            self._outcome.num_outputs += sum(part.get("type") == "image_url" for part in content)

    def _usage(self, usage: dict[str, Any]) -> None:
        if "completion_tokens" in usage:
            self._has_usage = True
            self._outcome.num_tokens = usage["completion_tokens"] or 0
            self._outcome.num_prompt_tokens = usage.get("prompt_tokens") or 0


def _cause(error: Any) -> str:
    return str(error.get("code") or error.get("type") or error.get("message")) if isinstance(error, dict) else "unknown"
