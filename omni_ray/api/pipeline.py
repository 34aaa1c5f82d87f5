"""From a prompt to images: a DiT model draws; in a chain an AR model first rewrites what a person said."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from omni_ray.api.directory import Directory
from omni_ray.api.forward import Forwarder
from omni_ray.api.jobs import Jobs, Progress, Result
from omni_ray.api.limits import Inputs, make_job
from omni_ray.api.protocol import Generation
from omni_ray.config.spec import Pipeline
from omni_ray.errors import EngineFailed, RequestError
from omni_ray.messages import HttpRequest, Job, Route


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
        self, route: Route, request: Generation, inputs: Inputs, request_id: str, num_previews: int = 0
    ) -> AsyncGenerator[Rewritten | Progress | Result, None]:
        """What comes to be, one after the other: the new prompt if ``route`` is a chain, progress, and last the media.

        :raises RequestError: the model cannot do what is asked; told before anything is computed.
        """
        drawing, job, rewritten = await self.prepare(route, request, inputs, request_id)
        if rewritten:
            yield rewritten
        async with aclosing(self._jobs.run(drawing, dataclasses.replace(job, num_previews=num_previews))) as steps:
            async for step in steps:
                yield step

    async def prepare(
        self, route: Route, request: Generation, inputs: Inputs, request_id: str
    ) -> tuple[Route, Job, Rewritten | None]:
        """The route of the model that draws, the job for it, and its new prompt if ``route`` is a chain.

        :raises RequestError: the model cannot do what is asked; told before the prompt is rewritten.
        """
        chain = self._chains.get(route.group)
        drawing = await self._directory.loaded(route.limits["generate"] if chain else route.group)
        job = make_job(request, inputs, drawing, request_id)
        if not chain:
            return drawing, job, None
        rewritten = await self._rewrite(chain, route.limits["rewrite"], inputs.prompt, request_id)
        inputs = dataclasses.replace(inputs, prompt=rewritten.text)
        return drawing, make_job(request, inputs, drawing, request_id), rewritten

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
