"""``omni-ray generate`` against a running server: chat as a stream, all that is drawn as a job."""

from __future__ import annotations

import json
import mimetypes
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx

from omni_ray.cli.generate import Asked, Caption, Cost, Output, Step, Text, Update
from omni_ray.errors import ConfigError, OmniRayError, Unavailable

TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""In seconds. A chain rewrites the prompt before it answers, and a model may be loading."""

POLL_S = 0.25
PATIENCE_S = 120.0
"""How long a server that does not answer is asked after a job, which outlives it."""

TEXT_FIELDS = frozenset(("max_tokens", "temperature", "seed", "n"))


class Remote:
    """The server at ``url``; ``api_key`` may be empty."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self._url, timeout=TIMEOUT, headers=headers)

    def run(self, asked: Asked) -> Generator[Update, None, None]:
        """What happens, last the outputs and the cost. Closing this, or an error in it, cancels the request.

        :raises ConfigError: the model is not there, or does not do what is asked.
        :raises OmniRayError: what the server says.
        """
        with self._http:
            model, output = self._choose(asked)
            if output == "text":
                yield from self._chat(model, asked)
            else:
                yield from self._draw(model, output, asked)

    def _choose(self, asked: Asked) -> tuple[str, str]:
        """The model's name, and what it makes: text, image or video."""
        models = {each["id"]: each for each in self._call("GET", "/v1/models").json()["data"]}
        name = asked.model or (next(iter(models)) if len(models) == 1 else "")
        if name not in models:
            have = ", ".join(f"{each['id']} ({each['type']})" for each in models.values())
            problem = f"{name!r} is not served at {self._url}" if name else "which one is not said"
            raise ConfigError(f"--model: {problem}; there is {have}")
        model = models[name]
        if model["type"] == "ar":
            return name, "text"
        limits = models[model["limits"]["generate"]]["limits"] if model["type"] == "pipeline" else model["limits"]
        return name, limits.get("output", "image")

    def _chat(self, model: str, asked: Asked) -> Iterator[Update]:
        wrong = sorted(asked.fields.keys() - TEXT_FIELDS)
        if wrong or asked.images or asked.mask:
            what = ", ".join(wrong) or "an image"
            raise ConfigError(
                f"{model} writes text and takes no {what}; leave that out, or choose a --model that draws"
            )
        body = {"model": model, "messages": [{"role": "user", "content": asked.prompt}], "stream": True, **asked.fields}
        with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                reply.read()
            _check(reply)
            for line in reply.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _failed(event["error"])
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield Text(text)
        yield Text("\n")

    def _draw(self, model: str, output: str, asked: Asked) -> Iterator[Update]:
        job = self._submit(model, output, asked)
        try:
            if caption := job.get("revised_prompt"):
                yield Caption(caption)
            while job["status"] in ("queued", "in_progress"):
                yield _step(job)
                time.sleep(POLL_S)
                job = yield from self._ask_again(job["id"])
        except BaseException:
            self._call("POST", f"/v1/jobs/{job['id']}/cancel")
            raise
        if job["error"] or job["status"] != "completed":
            raise _failed(job["error"] or {"message": f"the job {job['id']} was cancelled by someone else"})
        for index in range(job["num_outputs"]):
            reply = self._call("GET", f"/v1/jobs/{job['id']}/content", params={"index": index})
            yield Output(reply.content, reply.headers["content-type"].partition("/")[2])
        yield Cost(job["omni"])

    def _submit(self, model: str, output: str, asked: Asked) -> dict[str, Any]:
        fields = {"model": model, "prompt": asked.prompt, **asked.fields}
        if output == "video":
            path, name = "/v1/videos", "input_reference"
        else:
            path, name = "/v1/images/edits" if asked.images else "/v1/images/generations", "image"
            fields["async"] = True
        if not asked.images:
            return _object(self._call("POST", path, json=fields))
        with ExitStack() as opened:
            named = [(name, file) for file in asked.images] + ([("mask", asked.mask)] if asked.mask else [])
            files = [
                (kind, (file.name, opened.enter_context(file.open("rb")), mimetypes.guess_type(file.name)[0]))
                for kind, file in named
            ]
            data = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in fields.items()}
            return _object(self._call("POST", path, data=data, files=files))

    def _ask_again(self, job_id: str) -> Generator[Update, None, dict[str, Any]]:
        """The job; where the server does not answer, it is asked until it does: the job goes on when it is back."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return _object(self._call("GET", f"/v1/jobs/{job_id}"))
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            yield Step(doing="the server does not answer; asking again")
            time.sleep(POLL_S)

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return _check(self._http.request(method, path, **more))
        except httpx.TransportError as error:
            raise Unavailable(
                f"no server answers at {self._url} ({error}); start one, or name it with --url"
            ) from error


def _check(reply: httpx.Response) -> httpx.Response:
    if reply.is_success:
        return reply
    try:
        error = _failed(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        error = OmniRayError(f"{reply.url} answered {reply.status_code}: {reply.text[:300]}")
    if wait := reply.headers.get("retry-after"):
        error = OmniRayError(f"{error.message} (try again in {wait} s)")
    raise Unavailable(error.message) if reply.status_code in (502, 503, 504) else error


def _object(reply: httpx.Response) -> dict[str, Any]:
    answer: dict[str, Any] = reply.json()
    return answer


def _step(job: dict[str, Any]) -> Step:
    if job["status"] == "queued":
        ahead = job["queue_position"]
        return Step(doing=f"queued, {ahead} before it" if ahead else "queued", seconds_left=job["seconds_left"])
    return Step(doing=job["model"], step=job["step"], num_steps=job["num_steps"], seconds_left=job["seconds_left"])


def _failed(error: dict[str, Any]) -> OmniRayError:
    """The error that the server tells, as one of ours."""
    return OmniRayError(str(error.get("message", error)))
