"""What no server should choke on: each gets its 4xx at once, and the next good request is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Server

pytestmark = pytest.mark.cluster

IMAGES = "/v1/images/generations"
CHAT = "/v1/chat/completions"
GOOD = {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 1}
HUNDRED_MB = 100_000_000
SOON_S = 10
"""Longest silence of the server before an answer that takes it milliseconds, on a machine that is busy."""


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def good_request_follows(client: httpx.Client) -> Iterator[None]:
    yield
    response = client.post(IMAGES, json=GOOD)
    assert response.status_code == 200, response.text


def refused(client: httpx.Client, status: int, path: str, **request: Any) -> dict[str, Any]:
    """The OpenAI error object of a request that is refused."""
    response = client.post(path, timeout=SOON_S, **request)
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", [IMAGES, CHAT, "/v1/completions"])
@pytest.mark.parametrize("body", [b"hello", b"", b'{"model": ', b"\xff\xfe", b"[" * 200_000, b"[1, 2]", b"null"])
def test_not_a_json_object(client: httpx.Client, path: str, body: bytes) -> None:
    assert "the body is" in refused(client, 400, path, content=body)["message"]


@pytest.mark.parametrize("path", [IMAGES, CHAT, "/v1/completions"])
def test_a_body_of_100_mb(client: httpx.Client, path: str) -> None:
    assert refused(client, 413, path, content=b" " * HUNDRED_MB)["code"] == "request_too_large"


def test_a_body_of_100_mb_whose_length_is_not_told(client: httpx.Client) -> None:
    pieces = [b" " * 1_000_000] * (HUNDRED_MB // 1_000_000)
    assert refused(client, 413, CHAT, content=pieces)["code"] == "request_too_large"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_guidance_that_is_no_number(client: httpx.Client, number: str) -> None:
    body = f'{{"model": "demo-image", "prompt": "a red circle", "guidance_scale": {number}}}'
    assert refused(client, 400, IMAGES, content=body.encode())["param"] == "guidance_scale"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "250x256"}, "size"),
        ({"size": "0x0"}, "size"),
        ({"size": "99984x99984"}, "size"),
        ({"size": "large"}, "size"),
        ({"width": -256}, "width"),
        ({"height": 10**9}, "height"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 2**20}, "prompt"),
        ({"num_frames": 2}, "num_frames"),
        ({"output_format": "gif"}, "output_format"),
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_a_field_that_does_not_fit(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(client, 400, IMAGES, json=GOOD | fields)
    assert error["param"] == param
    assert param in error["message"]
    assert len(error["message"]) < 1000


def test_an_unknown_field_is_told_the_nearest(client: httpx.Client) -> None:
    error = refused(client, 400, IMAGES, json=GOOD | {"guidence_scale": 3.0})
    assert error["param"] == "guidence_scale"
    assert "did you mean guidance_scale?" in error["message"]


@pytest.mark.parametrize("path", [IMAGES, CHAT, "/v1/completions", "/tokenize"])
def test_an_unknown_model_is_told_the_known_ones(client: httpx.Client, path: str) -> None:
    error = refused(client, 404, path, json={"model": "gpt-4", "prompt": "a", "messages": []})
    assert error["message"] == (
        "The model 'gpt-4' does not exist; choose one of: demo-chat, demo-image, demo-omni, demo-video"
    )
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_prompt_of_1_mb_to_a_language_model(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x" * 2**20}]
    refused(client, 400, CHAT, json={"model": "demo-chat", "messages": messages})
    refused(client, 400, CHAT, json={"model": "demo-omni", "messages": messages})


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        5,
        [],
        [{"type": "input_audio"}],
        [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}],
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}],
        [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}],
    ],
)
@pytest.mark.parametrize("model", ["demo-image", "demo-omni"])
def test_messages_that_cannot_be_drawn(client: httpx.Client, model: str, content: Any) -> None:
    refused(client, 400, CHAT, json={"model": model, "messages": [{"role": "user", "content": content}]})


def test_a_model_of_the_wrong_type(client: httpx.Client) -> None:
    assert refused(client, 400, IMAGES, json={"model": "demo-chat", "prompt": "a"})["param"] == "model"
    assert refused(client, 400, "/v1/completions", json=GOOD)["param"] == "model"


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert refused(client, 404, "/v1/nothing", json={})["code"] == "unknown_path"
    assert client.get("/nothing").json()["error"]["code"] == "unknown_path"
    assert client.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_a_request_id_comes_back(client: httpx.Client) -> None:
    response = client.post(IMAGES, json=GOOD, headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_pages_for_operators(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["ready"] is True
    assert "omni_ray_node_scraped" in client.get("/metrics").text
    assert "num_inference_steps" in client.get("/openapi.json").text
    assert client.get("/docs").status_code == 200
