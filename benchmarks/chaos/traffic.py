"""A mix of requests that goes on without a pause, and what each one came to.

Clients do what a careful client does: they send a request again, to the next node, when the connection fails or the
server says 429 or 503, with the same idempotency key; and they ask a server that is silent whether it is there
(TCP keepalive). What they see of a fault is counted.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx

from benchmarks.chaos.deployment import NAMES

GIVE_UP_S = 240.0
POLL_S = 0.4
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
VARIANTS = 4
"""Requests of a kind, each of which has one right answer."""

CHAT = {"model": "demo-chat", "temperature": 0, "max_tokens": 64, "ignore_eos": True}
IMAGE = {"model": "demo-image", "num_inference_steps": 12}
VIDEO = {"model": "demo-video", "num_inference_steps": 8}
COLOURS = ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class Kind:
    """``clients`` send requests of this kind, one after the other."""

    name: str
    path: str
    clients: int
    is_job: bool = False

    def body(self, variant: int) -> dict[str, Any]:
        thing = f"a {COLOURS[variant]} circle"
        if self.name in ("chat", "stream"):
            words = {"messages": [{"role": "user", "content": f"please draw {thing}"}]}
            return CHAT | words | {"stream": self.name == "stream"}
        if self.name == "video":
            return VIDEO | {"prompt": f"{thing} moving right", "seed": variant}
        return IMAGE | {"prompt": thing, "seed": variant} | ({"async": True} if self.is_job else {})


KINDS = (
    Kind("chat", "/v1/chat/completions", 1),
    Kind("stream", "/v1/chat/completions", 1),
    Kind("image", "/v1/images/generations", 1),
    Kind("image job", "/v1/images/generations", 1, is_job=True),
    Kind("video", "/v1/videos", 1, is_job=True),
)


@dataclass
class Outcome:
    """A request from its first attempt to its end; times are monotonic. ``answer`` is None if it never came."""

    kind: Kind
    variant: int
    started: float
    ended: float = 0.0
    answer: bytes | None = None
    retries: list[tuple[float, str]] = field(default_factory=list)
    """When it was sent again, and why: a lost connection, a broken stream, a 429 or 503."""

    errors: list[tuple[float, str]] = field(default_factory=list)
    steps_again: list[tuple[float, int]] = field(default_factory=list)
    """Steps that a job had told of and that were computed once more."""

    job_ids: list[str] = field(default_factory=list)
    """The job, after those of it that failed."""

    def retry(self, why: str) -> NoReturn:
        self.retries.append((time.monotonic(), why))
        raise _Again

    def fail(self, error: str) -> NoReturn:
        self.errors.append((time.monotonic(), error))
        raise _Again


class _Again(Exception):
    """The request may be sent again."""


class Traffic:
    """``addresses`` gives the addresses that may be tried now. Clients rest for ``pause_s`` between two requests, lest
    new processes get no core to start on."""

    def __init__(self, addresses: Callable[[], list[str]], pause_s: float = 1.0, models: Sequence[str] = NAMES) -> None:
        self._addresses = addresses
        self._kinds = [kind for kind in KINDS if kind.body(0)["model"] in models]
        self._pause_s = pause_s
        self._stop = threading.Event()
        self.outcomes: list[Outcome] = []
        self._threads: list[threading.Thread] = []

    def reference(self) -> dict[tuple[str, int], bytes]:
        """The right answer of every request, by kind and variant."""
        answers = {}
        for kind in self._kinds:
            for variant in range(VARIANTS):
                outcome = self.send(kind, variant)
                assert outcome.answer is not None, outcome
                answers[kind.name, variant] = outcome.answer
        return answers

    def start(self) -> None:
        for kind in self._kinds:
            for client in range(kind.clients):
                thread = threading.Thread(target=self._send_forever, args=(kind, client), daemon=True)
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """Let what runs come to its end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(GIVE_UP_S + 60)

    def _send_forever(self, kind: Kind, client: int) -> None:
        for number in itertools.count(client):
            if self._stop.is_set():
                return
            outcome = self.send(kind, number % VARIANTS)
            self.outcomes.append(outcome)
            if outcome.errors or outcome.answer is None:
                print(f"{kind.name}: {outcome.errors or 'no answer'}", flush=True)
            self._stop.wait(self._pause_s)

    def send(self, kind: Kind, variant: int) -> Outcome:
        """One request, sent until it is answered or the time is up."""
        outcome, key = Outcome(kind, variant, time.monotonic()), uuid.uuid4().hex
        transport = httpx.HTTPTransport(socket_options=KEEPALIVE)
        with httpx.Client(timeout=httpx.Timeout(GIVE_UP_S, connect=3), transport=transport) as client:
            while outcome.answer is None and time.monotonic() - outcome.started < GIVE_UP_S:
                try:
                    outcome.answer = self._job(client, outcome, key) if kind.is_job else self._call(client, outcome)
                except _Again:
                    time.sleep(0.5)
        outcome.ended = time.monotonic()
        return outcome

    def _call(self, client: httpx.Client, outcome: Outcome) -> bytes:
        kind = outcome.kind
        body = self._ask(client, outcome, "POST", kind.path, json=kind.body(outcome.variant)).content
        if kind.name == "stream":
            return "".join(_pieces(body, outcome)).encode()
        answer = json.loads(body)
        if kind.name == "chat":
            return str(answer["choices"][0]["message"]["content"]).encode()
        return str(answer["data"][0]["b64_json"]).encode()

    def _job(self, client: httpx.Client, outcome: Outcome, key: str) -> bytes:
        failed = sum(error.startswith("job ") for _, error in outcome.errors)
        if len(outcome.job_ids) == failed:
            body, headers = outcome.kind.body(outcome.variant), {"idempotency-key": f"{key}-{failed}"}
            made = self._ask(client, outcome, "POST", outcome.kind.path, json=body, headers=headers).json()
            outcome.job_ids.append(made["id"])
        path, step = f"/v1/jobs/{outcome.job_ids[-1]}", 0
        while (job := self._ask(client, outcome, "GET", path).json())["status"] in ("queued", "in_progress"):
            if job["step"] < step:
                outcome.steps_again.append((time.monotonic(), step - job["step"]))
            step = job["step"]
            time.sleep(POLL_S)
        if job["status"] != "completed":
            outcome.fail(f"job {job['status']}: {job['error']}")
        return self._ask(client, outcome, "GET", f"{path}/content").content

    def _ask(self, client: httpx.Client, outcome: Outcome, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            reply = client.request(method, random.choice(self._addresses()) + path, **request)
        except httpx.TransportError:
            outcome.retry("connection lost")
        if reply.status_code in (429, 503):
            outcome.retry(f"refused with {reply.status_code}")
        if reply.status_code >= 300:
            outcome.fail(f"{reply.status_code} {method} {path}: {reply.text[:300]}")
        return reply

    def stored_jobs(self) -> set[str]:
        """The ids of all jobs that the server has."""
        found, after = set[str](), dict[str, str]()
        while True:
            query = {"limit": "100", **after}
            page = httpx.get(f"{self._addresses()[0]}/v1/jobs", params=query, timeout=30, trust_env=False).json()
            found |= {job["id"] for job in page["data"]}
            if not page["has_more"]:
                return found
            after = {"after": page["last_id"]}


def _pieces(body: bytes, outcome: Outcome) -> Iterator[str]:
    for line in body.decode().splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "choices" not in event:
                outcome.retry("stream broken")
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    if "data: [DONE]" not in body.decode():
        outcome.retry("stream broken")
