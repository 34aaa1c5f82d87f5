"""One request of a workload: what is sent, when, and the class that it is judged with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["chat", "images", "videos"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PATHS: dict[Kind, str] = {"chat": "/v1/chat/completions", "images": "/v1/images/generations", "videos": "/v1/videos"}


@dataclass(frozen=True)
class Request:
    """``at_s`` is when it arrives, in seconds from the start; ``body`` is the JSON body, or the form of a video."""

    kind: Kind
    body: dict[str, Any]
    at_s: float = 0.0

    @property
    def model(self) -> str:
        return str(self.body.get("model"))

    @property
    def label(self) -> str:
        """Its class: requests of one class cost about the same, so that one latency alone stands for all of them."""
        said = self.body.get
        if self.kind == "chat":
            parts = [f"{tokens} tokens" if (tokens := said("max_tokens")) else ""]
        else:
            steps = said("num_inference_steps")
            frames, seconds = said("num_frames"), said("seconds")
            length = f"{frames} frames" if frames else f"{seconds} s" if seconds else ""
            parts = [said("size") or "", length, f"{steps} steps" if steps else ""]
        return f"{self.model} " + (", ".join(part for part in parts if part) or self.kind)
