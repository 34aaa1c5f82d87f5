"""From a prompt to images: a DiT model draws; in a chain an AR model first rewrites what a person said."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from omni_ray.api.directory import Directory
from omni_ray.api.forward import Forwarder
from omni_ray.api.jobs import Jobs, Result
from omni_ray.api.limits import make_job
from omni_ray.api.protocol import Generation
from omni_ray.config.spec import Pipeline
from omni_ray.errors import EngineFailed, RequestError
from omni_ray.messages import HttpRequest, Route


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The prompt that the AR model of a chain made, and OpenAI's ``usage`` of it."""

    text: str
    usage: dict[str, Any]


class Drawer:
    """``chains`` are the models of type `pipeline`, by name."""

    def __init__(self, chains: dict[str, Pipeline], directory: Directory, forwarder: Forwarder, jobs: Jobs) -> None:
        self._chains = chains
        self._directory = directory
        self._forwarder = forwarder
        self._jobs = jobs

    async def draw(
        self, route: Route, request: Generation, prompt: str, images: tuple[bytes, ...], request_id: str
    ) -> AsyncGenerator[Rewritten | Result, None]:
        """What comes to be, one after the other: the new prompt if ``route`` is a chain, then the media.

        :raises RequestError: the model cannot do what is asked; told before anything is computed.
        """
        chain = self._chains.get(route.group)
        drawing = await self._directory.loaded(route.limits["generate"] if chain else route.group)
        job = make_job(request, prompt, images, drawing, request_id)
        if chain:
            rewritten = await self._rewrite(chain, route.limits["rewrite"], prompt, request_id)
            yield rewritten
            job = make_job(request, rewritten.text, images, drawing, request_id)
        yield await self._jobs.run(drawing, job)

    async def _rewrite(self, chain: Pipeline, group: str, prompt: str, request_id: str) -> Rewritten:
        system = [{"role": "system", "content": chain.instructions}] if chain.instructions else []
        message = HttpRequest(
            method="POST",
            path="/v1/chat/completions",
            headers=(("content-type", "application/json"), ("x-request-id", request_id)),
            body=to_json(
                {
                    "model": group,
                    "messages": [*system, {"role": "user", "content": prompt}],
                    "temperature": 0,
                    "max_tokens": chain.max_tokens,
                }
            ),
        )
        response = await self._forwarder.send(group, message)
        reply = from_json(bytes(response.body))
        if response.status_code != 200:
            kind = RequestError if response.status_code < 500 else EngineFailed
            raise kind(f"{group} could not rewrite the prompt: {reply['error']['message']}", param="prompt")
        text = (reply["choices"][0]["message"]["content"] or "").strip()
        if not text:
            raise EngineFailed(f"{group} rewrote the prompt into nothing")
        return Rewritten(text, reply["usage"])
