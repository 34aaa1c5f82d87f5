"""``/v1/chat/completions`` of models that draw: the last user message is the prompt, the reply's content has images."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Response
from pydantic_core import to_json

from omni_ray.api import sse
from omni_ray.api.images import Step, data_url, how_far
from omni_ray.api.inputs import from_data_url
from omni_ray.api.jobs import Result
from omni_ray.api.limits import Inputs
from omni_ray.api.pipeline import Drawer, Rewritten
from omni_ray.api.protocol import ChatRequest, Part, parse
from omni_ray.api.uploads import check_image
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError
from omni_ray.messages import Media, Preview, Route

Parts = list[dict[str, Any]]


async def chat_with_drawer(drawer: Drawer, route: Route, body: dict[str, Any], request_id: str) -> Response:
    """A `chat.completion`, or its chunks where ``stream`` says so."""
    chat = parse(ChatRequest, body)
    prompt, images = read_prompt(chat)
    for number, image in enumerate(images):
        await check_image(image, f"image {number}")
    num_previews = chat.partial_images or 0 if chat.stream else 0
    steps = drawer.draw(route, chat, Inputs(prompt=prompt, images=images), request_id, num_previews)
    reply = Reply(chat, request_id)
    if chat.stream:
        first = await anext(steps)  # before the head is sent, so that what fails here fails with a status
        return sse.EventStream(reply.chunks(first, steps))
    content = [part async for step in steps if isinstance(step, (Rewritten, Result)) for part in reply.add(step)]
    return Response(to_json(reply.whole(content)), media_type="application/json")


class Reply:
    """The wording of one reply. ``usage`` counts the tokens of a chain's AR model; images are no tokens."""

    def __init__(self, chat: ChatRequest, request_id: str) -> None:
        self._chat = chat
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": chat.model}
        self._usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        self._omni: dict[str, Any] = {}

    def add(self, step: Rewritten | Result) -> Parts:
        """The parts of the message that ``step`` brings."""
        if isinstance(step, Rewritten):
            self._usage = step.usage
            return [{"type": "text", "text": step.text}]
        self._omni = step.omni()
        return [_part(media) for media in step.media]

    def whole(self, content: Parts) -> dict[str, Any]:
        """The reply after its last step."""
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage, "omni": self._omni}

    async def chunks(self, first: Step, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        """The reply as events: the role, the parts of each step as it comes, the end."""
        yield self._chunk({"role": "assistant"})
        async with aclosing(steps):
            for chunk in self._chunks_of(first):
                yield chunk
            async for step in steps:
                for chunk in self._chunks_of(step):
                    yield chunk
        yield self._chunk({}, "stop", omni=self._omni)
        if self._chat.stream_options and self._chat.stream_options.include_usage:
            yield sse.event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage})
        yield sse.DONE

    def _chunks_of(self, step: Step) -> Iterator[bytes]:
        """A preview is a part like the image itself; progress, where it is wanted, stands in ``omni``."""
        if isinstance(step, (Rewritten, Result)):
            yield self._chunk({"content": self.add(step)})
        elif isinstance(step, Preview):
            preview = {"preview": step.index, "step": step.step}
            yield self._chunk({"content": [_part(step.media)]}, omni=preview)
        elif self._chat.progress:
            yield self._chunk({}, omni=how_far(step))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return sse.event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | more)


def _part(media: Media) -> dict[str, Any]:
    kind = "video_url" if media.format == "mp4" else "image_url"
    return {"type": kind, kind: {"url": data_url(media)}}


def read_prompt(chat: ChatRequest) -> tuple[str, tuple[bytes, ...]]:
    """Text and input images of the last user message; RequestError where a part is neither."""
    index = max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=-1)
    if index < 0:
        raise RequestError("messages: none is by the user; the last user message is the prompt", param="messages")
    content = chat.messages[index].content
    if isinstance(content, str) or content is None:
        return content or "", ()
    texts, images = [], []
    for number, part in enumerate(content):
        where = f"messages.{index}.content.{number}"
        if part.type == "text" and part.text is not None:
            texts.append(part.text)
        elif part.type == "image_url" and part.image_url is not None:
            images.append(from_data_url(part.image_url.url, f"{where}.image_url.url"))
        else:
            raise RequestError(f"{where}: {_unknown(part)}", param=where)
    return "\n".join(texts), tuple(images)


def _unknown(part: Part) -> str:
    if part.type in ("text", "image_url"):
        return f"a part of type {part.type} needs the key {part.type}"
    return f"type {shown(part.type)} is none of text, image_url"
