"""Who is let in and what is written down of it, on the whole ingress application in this process."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from fastapi import Request

from omni_ray.api import access, caller
from omni_ray.api.app import Api
from omni_ray.config.keys import hash_of, new_key
from omni_ray.config.spec import OmniSpec
from omni_ray.messages import Capabilities, Event, GroupStatus, HttpHead, HttpRequest, Job, Media, Owner, Route, Usage
from omni_ray.router.quota import Quotas

ALICE, BOB, CAROL = (new_key() for _ in range(3))
CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "a secret"}]}
CIRCLE = {"model": "d", "prompt": "a circle"}
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: no such file'


class Stream:
    """Stands where Serve's response generator stands."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._items = items
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        self.is_cancelled = True


class Cluster:
    """The router and the AR replica of an application with an AR model `m` and a DiT model `d`, as their handles show
    them. What the router counts, it counts with its own `Quotas`."""

    def __init__(self) -> None:
        self.quotas = Quotas()
        self.jobs: list[Job] = []
        self.requests: list[HttpRequest] = []
        self.error: Exception | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        drawing = Capabilities(pipeline="P", output="image", fields=frozenset({"prompt", "width", "height"}))
        limits = {f: getattr(drawing, f) for f in Capabilities.__slots__} | {"max_prompt_chars": 99}
        limits["defaults"] = {"width": 256, "height": 256, "num_frames": 9}
        self._routes = (
            Route(group="m", name="m", profile=None, type="ar", names=("m",), ready=True),
            Route(group="d", name="d", profile=None, type="dit", names=("d",), ready=True, limits=limits),
        )
        self.routes = SimpleNamespace(remote=self._tell_routes)
        self.status = SimpleNamespace(remote=self._tell_status)
        self.count = SimpleNamespace(remote=self._count)

    def options(self, method_name: str, stream: bool) -> Any:
        return SimpleNamespace(remote=getattr(self, f"_{method_name}"))

    async def _tell_routes(self) -> tuple[Route, ...]:
        return self._routes

    async def _tell_status(self) -> tuple[GroupStatus, ...]:
        return (GroupStatus(group="m", ready=True, replicas={"RUNNING": 1}, message=TRACE),)

    async def _count(self, key: str, requests_per_minute: int) -> None:
        self.quotas.count(key, requests_per_minute)

    def _run(self, job: Job) -> Stream:
        self.jobs.append(job)
        return Stream(self._draw(job))

    async def _draw(self, job: Job) -> AsyncGenerator[Event, None]:
        yield Media(job_id=job.id, index=0, format="png", data=b"x", width=1, height=1)
        yield Usage(job_id=job.id, seed=1, steps_computed=1, steps_skipped=0, device_s=1.0, queue_s=0.0, run_s=1.0)

    def _http(self, request: HttpRequest) -> Stream:
        self.requests.append(request)
        return Stream(self._speak(json.loads(request.body).get("stream", False)))

    async def _speak(self, stream: bool) -> AsyncGenerator[HttpHead | bytes, None]:
        if self.error and not stream:
            raise self.error
        kind = "text/event-stream" if stream else "application/json"
        yield HttpHead(status=200, headers=(("content-type", kind),))
        yield b"data: 1\n\n" if stream else b"{}"
        await self.hold.wait()
        if self.error:
            raise self.error


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    write_keys(file, alice=(ALICE, {}), bob=(BOB, {"models": ["d"], "max_pixels": 128 * 128, "max_frames": 9}))
    return file


def write_keys(file: Path, **keys: tuple[str, dict[str, Any]]) -> None:
    lines = [{"name": name, "hash": hash_of(key), "limits": limits} for name, (key, limits) in keys.items()]
    file.write_text(yaml.safe_dump({"keys": lines}))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="omni_ray.audit")
    return lambda: [json.loads(r.getMessage()) for r in caplog.records if r.name == "omni_ray.audit"]


def application(cluster: Any, **api: Any) -> Any:
    models = [{"name": "m", "type": "ar", "source": "x"}, {"name": "d", "type": "dit", "source": "x"}]
    spec = OmniSpec.model_validate({"models": models, "api": api})
    ingress = Api.__mro__[1](spec, cluster, {"m": cluster})  # without what Ray Serve puts around it
    return ingress.__serve_build_asgi_app__()


def client(cluster: Any, key: str | None = None, **api: Any) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(application(cluster, **api), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}, {"authorization": "Bearer "}])
async def test_without_a_key(headers: dict[str, str], cluster: Cluster, keys_file: Path) -> None:
    answer = await client(cluster, keys_file=str(keys_file)).post(CHAT, json=HELLO, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert "You didn't provide an API key" in error["message"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not cluster.requests


@pytest.mark.parametrize("path", [CHAT, IMAGES, "/v1/embeddings", "/v1/models", "/metrics", "/nowhere", "/health/"])
async def test_with_a_wrong_key(path: str, cluster: Cluster, keys_file: Path) -> None:
    wrong = client(cluster, ALICE[:-1], keys_file=str(keys_file))
    answer = await (wrong.get(path) if path in ("/v1/models", "/metrics") else wrong.post(path, json=HELLO))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert ALICE[:-1] not in answer.text
    assert not cluster.requests
    assert not cluster.jobs


@pytest.mark.parametrize("headers", [{"authorization": f"bearer  {ALICE}"}, {"x-api-key": ALICE}])
async def test_with_a_key(headers: dict[str, str], cluster: Cluster, keys_file: Path) -> None:
    answer = await client(cluster, keys_file=str(keys_file)).post(CHAT, json=HELLO, headers=headers)
    assert answer.status_code == 200
    assert not any(ALICE in value for _, value in cluster.requests[0].headers)


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json"])
async def test_open_paths_need_no_key(path: str, cluster: Cluster, keys_file: Path) -> None:
    assert (await client(cluster, keys_file=str(keys_file)).get(path)).status_code == 200


async def test_a_key_has_its_models(cluster: Cluster, keys_file: Path) -> None:
    bob = client(cluster, BOB, keys_file=str(keys_file))
    for model in ("m", "nothing"):
        answer = await bob.post(CHAT, json=HELLO | {"model": model})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_found")
        assert f"does not have access to the model '{model}'; it has access to: d" in answer.text
        assert (await bob.get(f"/v1/models/{model}")).status_code == 403
    assert [model["id"] for model in (await bob.get("/v1/models")).json()["data"]] == ["d"]
    assert (await bob.post(IMAGES, json=CIRCLE | {"size": "128x128"})).status_code == 200
    assert cluster.jobs[0].owner == Owner(key="bob")
    assert not cluster.requests


def test_a_name_stands_for_its_profiles() -> None:
    fast = Route(group="f:fast", name="f", profile="fast", type="dit", names=("f:fast", "f"), ready=True)
    key = SimpleNamespace(limits=SimpleNamespace(models=["f"]))
    token = caller.CALLER.set(caller.Caller("r", key=key))  # type: ignore[arg-type]
    try:
        assert caller.may_use("f:other", None)
        assert not caller.may_use("g", None)
        key.limits.models = ["f:fast"]
        assert caller.may_use("f", fast)
        assert not caller.may_use("f:other", None)
    finally:
        caller.CALLER.reset(token)


async def test_handlers_know_the_user(cluster: Cluster, keys_file: Path) -> None:
    app = application(cluster, keys_file=str(keys_file))

    async def who(request: Request) -> str:
        return str(request.state.user)

    app.add_api_route("/who", who)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as asking:
        names = [(await asking.get("/who", headers={"x-api-key": key})).json() for key in (ALICE, BOB)]
    assert names == ["alice", "bob"]


async def test_a_key_has_its_size(cluster: Cluster, keys_file: Path) -> None:
    bob = client(cluster, BOB, keys_file=str(keys_file))
    answer = await bob.post(IMAGES, json=CIRCLE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "width")
    assert "256 x 256 = 65536 pixels are more than the 16384 that the API key's max_pixels allows" in answer.text
    write_keys(keys_file, bob=(BOB, {"max_frames": 8}))
    answer = await client(cluster, BOB, keys_file=str(keys_file)).post(IMAGES, json=CIRCLE)
    assert "num_frames: 9 is more than the 8 that the API key's max_frames allows" in answer.text
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("path", "body", "bound"),
    [
        (CHAT, HELLO, ("max_completion_tokens", 100)),
        (CHAT, HELLO | {"n": 3}, ("max_completion_tokens", 33)),
        (CHAT, HELLO | {"max_tokens": 100}, None),
        (CHAT, HELLO | {"max_tokens": 4000, "max_completion_tokens": 50}, None),
        ("/v1/completions", {"model": "m", "prompt": ["a", "b"]}, ("max_tokens", 16)),
        ("/v1/completions", {"model": "m", "prompt": list("abcdefghij")}, ("max_tokens", 10)),
        ("/v1/messages", HELLO, None),  # where vLLM wants it to be said
        ("/v1/embeddings", {"model": "m", "input": "a"}, None),
    ],
)
async def test_a_key_has_its_tokens(
    path: str, body: dict[str, Any], bound: Any, cluster: Cluster, keys_file: Path
) -> None:
    write_keys(keys_file, bob=(BOB, {"max_tokens": 100}))
    assert (await client(cluster, BOB, keys_file=str(keys_file)).post(path, json=body)).status_code == 200
    assert (json.loads(cluster.requests[0].body), cluster.requests[0].bound) == (body, bound)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, HELLO | {"max_tokens": 101}, "max_tokens"),
        (CHAT, HELLO | {"max_tokens": 51, "n": 2}, "max_tokens"),
        (CHAT, HELLO | {"max_tokens": 5, "max_completion_tokens": 101}, "max_completion_tokens"),
        (CHAT, HELLO | {"n": 101}, "n"),
        (CHAT, HELLO | {"max_tokens": "101"}, "max_tokens"),
        ("/v1/completions", {"model": "m", "prompt_embeds": ["a", "b"], "max_tokens": 51}, "max_tokens"),
        ("/v1/responses", {"model": "m", "input": "a", "max_output_tokens": 101}, "max_output_tokens"),
    ],
)
async def test_a_key_beyond_its_tokens(
    path: str, body: dict[str, Any], param: str, cluster: Cluster, keys_file: Path
) -> None:
    write_keys(keys_file, bob=(BOB, {"max_tokens": 100}))
    answer = await client(cluster, BOB, keys_file=str(keys_file)).post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not cluster.requests


async def test_a_key_over_its_rate_on_two_ingress_replicas(cluster: Cluster, keys_file: Path) -> None:
    write_keys(keys_file, alice=(ALICE, {"requests_per_minute": 3}), bob=(BOB, {}))
    replicas = [client(cluster, ALICE, keys_file=str(keys_file)) for _ in range(2)]
    answers = [await replicas[i % 2].post(CHAT, json=HELLO) for i in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    error = answers[-1].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "its limit requests_per_minute is 3" in error["message"]
    assert 55 < int(answers[-1].headers["retry-after"]) <= 60
    assert (await replicas[0].get("/v1/models")).status_code == 200
    assert (await client(cluster, BOB, keys_file=str(keys_file)).post(CHAT, json=HELLO)).status_code == 200
    assert len(cluster.requests) == 4


async def test_a_changed_file_counts_without_a_restart(
    cluster: Cluster, keys_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    server = client(cluster, keys_file=str(keys_file))

    async def statuses() -> list[int]:
        keys = (ALICE, BOB, CAROL)
        return [(await server.get("/v1/models", headers={"x-api-key": key})).status_code for key in keys]

    assert await statuses() == [200, 200, 401]
    write_keys(keys_file, bob=(BOB, {}), carol=(CAROL, {}))
    assert await statuses() == [401, 200, 200]
    keys_file.write_text("keys: [")
    assert await statuses() == [401, 200, 200]
    keys_file.unlink()
    assert await statuses() == [401, 200, 200]
    told = list(dict.fromkeys(text for r in caplog.records if "stay in force" in (text := r.getMessage())))
    assert len(told) == 2
    assert "is no YAML" in told[0]


@pytest.mark.parametrize("came", ["abc-1", "a" * 128])
async def test_a_request_id_is_kept(came: str, cluster: Cluster, lines: Any) -> None:
    await client(cluster).post(CHAT, json=HELLO, headers={"x-request-id": came})
    assert lines()[0]["id"] == came
    assert dict(cluster.requests[0].headers)["x-request-id"] == came


@pytest.mark.parametrize("came", [None, "", "a" * 129, "two words", "\x7f", "é"])
async def test_a_request_id_is_made(came: str | None, cluster: Cluster, lines: Any) -> None:
    headers = {} if came is None else {"x-request-id": came.encode()}
    answer = await client(cluster).post(CHAT, json=HELLO, headers=headers)  # type: ignore[arg-type]
    assert len(lines()[0]["id"]) == 36
    assert answer.headers["x-request-id"] == lines()[0]["id"] == dict(cluster.requests[0].headers)["x-request-id"]


async def test_the_audit_line_has_no_prompt(cluster: Cluster, keys_file: Path, lines: Any) -> None:
    alice = client(cluster, ALICE, keys_file=str(keys_file))
    await alice.post(CHAT + "?token=query", json=HELLO)
    await alice.post(IMAGES, json=CIRCLE | {"width": 128})
    await client(cluster, keys_file=str(keys_file)).post(CHAT, json=HELLO)
    await alice.get("/health")
    chat, image, refused = lines()
    assert (chat["key"], chat["path"], chat["model"], chat["status"]) == ("alice", CHAT, "m", 200)
    assert (chat["outcome"], chat["response_bytes"], chat["method"]) == ("complete", 2, "POST")
    assert chat["request_bytes"] == len(cluster.requests[0].body)
    assert image["job"] == {"id": cluster.jobs[0].id, "num_outputs": 1, "width": 128}
    assert (refused["key"], refused["status"], refused["model"]) == (None, 401, None)
    for word in ("secret", "circle", "query", ALICE):
        assert word not in json.dumps(lines())


async def test_prompts_are_written_when_asked_for(cluster: Cluster, lines: Any) -> None:
    asking = client(cluster, audit_prompts=True)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    await asking.post(CHAT, json=HELLO | {"messages": [{"role": "user", "content": [picture]}]})
    await asking.post(IMAGES, json=CIRCLE)
    chat, image = lines()
    assert len(chat["prompts"]["messages"][0]["content"][0]["image_url"]["url"]) == 48
    assert image["prompts"] == {"prompt": "a circle", "drawn": ["a circle"]}


async def test_a_stream_is_written_down_at_its_end(cluster: Cluster, lines: Any) -> None:
    cluster.hold.clear()
    asking = asyncio.create_task(client(cluster).post(CHAT, json=HELLO | {"stream": True}))
    await asyncio.sleep(0.05)
    assert lines() == []
    cluster.hold.set()
    await asking
    assert (lines()[0]["outcome"], lines()[0]["response_bytes"]) == ("complete", len(b"data: 1\n\n"))
    assert lines()[0]["seconds"] >= 0.05


@pytest.mark.parametrize("stream", [True, False])
async def test_a_lost_client_is_written_down(stream: bool, cluster: Cluster, lines: Any) -> None:
    cluster.hold.clear()
    asking = asyncio.create_task(client(cluster).post(CHAT, json=HELLO | {"stream": stream}))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [(line["status"], line["outcome"]) for line in lines()] == [(200 if stream else 499, "cancelled")]


async def test_a_stream_that_breaks_is_written_down(cluster: Cluster, lines: Any) -> None:
    cluster.error = ValueError(TRACE)
    answer = await client(cluster).post(CHAT, json=HELLO | {"stream": True})
    assert "Traceback" not in answer.text
    assert [(line["status"], line["outcome"]) for line in lines()] == [(200, "failed")]


async def test_no_answer_has_a_stack_trace(cluster: Cluster, lines: Any) -> None:
    cluster.error = ValueError(TRACE)
    answer = await client(cluster).post(CHAT, json=HELLO, headers={"x-request-id": "r-7"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "request id r-7" in answer.text
    ready = await client(cluster).get("/ready")
    assert ready.json()["groups"][0]["message"] == "ValueError: no such file"
    for each in (answer, ready):
        assert not any(word in each.text for word in ("Traceback", "x.py", "line 1"))
    assert (lines()[0]["status"], lines()[0]["outcome"]) == (500, "complete")
