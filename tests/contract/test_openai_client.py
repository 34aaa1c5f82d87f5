"""The official openai client against the real server, its calls unchanged."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.conftest import Server

pytestmark = pytest.mark.cluster

ASK: Any = [{"role": "user", "content": "could you draw something round, the colour of a tomato, on the sea"}]
CIRCLE: Any = [{"role": "user", "content": "a red circle"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the canvas.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def opened(data: str) -> Image.Image:
    """An image from base64, or from a data: URL."""
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2] or data)))
    image.load()
    return image


def test_models(client: openai.OpenAI) -> None:
    kinds = {model.id: model.type for model in client.models.list()}  # type: ignore[attr-defined]
    assert kinds == {"demo-chat": "ar", "demo-image": "dit", "demo-omni": "pipeline"}
    image = client.models.retrieve("demo-image")
    assert image.ready  # type: ignore[attr-defined]
    assert image.limits["size_multiple"] == 16  # type: ignore[attr-defined]


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="demo-chat", messages=ASK, temperature=0, max_tokens=40)
    assert "red circle" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage
    assert reply.usage.completion_tokens > 0


def test_chat_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo-chat", messages=ASK, temperature=0, max_tokens=40)
    stream = client.chat.completions.create(
        model="demo-chat",
        messages=ASK,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo-chat", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * 4
    assert all(token.logprob <= 0 for token in logprobs.content)


def test_tools_may_be_left_unused(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo-chat", messages=ASK, tools=[TOOL], tool_choice="none", temperature=0, max_tokens=40
    )
    assert reply.choices[0].message.content
    assert not reply.choices[0].message.tool_calls


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo-chat",
        messages=ASK,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "paint"}},
        temperature=0,
        max_tokens=60,
    )
    calls: Any = reply.choices[0].message.tool_calls
    assert calls[0].function.name == "paint"
    assert json.loads(calls[0].function.arguments)["colour"] in ("red", "blue")


def test_json_schema(client: openai.OpenAI) -> None:
    schema = TOOL["function"]["parameters"]
    reply = client.chat.completions.create(
        model="demo-chat",
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}},
        temperature=0,
        max_tokens=60,
    )
    assert json.loads(reply.choices[0].message.content or "")["colour"] in ("red", "blue")


def test_completions_plain_and_stream(client: openai.OpenAI) -> None:
    said: Any = {"model": "demo-chat", "prompt": "a small green", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**said).choices[0].text
    assert whole
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**said, stream=True)) == whole


def test_images(client: openai.OpenAI) -> None:
    reply: Any = client.images.generate(
        model="demo-image",
        prompt="a red circle",
        n=2,
        size="256x256",
        response_format="b64_json",
        extra_body={"num_inference_steps": 4, "seed": 1},
    )
    first, second = (opened(image.b64_json) for image in reply.data)
    assert first.size == second.size == (256, 256)
    assert first.tobytes() != second.tobytes()
    assert (reply.size, reply.output_format, reply.omni["seed"]) == ("256x256", "png", 1)
    assert reply.omni["steps_computed"] == 4


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_image_formats(client: openai.OpenAI, output_format: Any) -> None:
    reply: Any = client.images.generate(
        model="demo-image",
        prompt="a red circle",
        size="128x64",
        response_format="url",
        output_format=output_format,
        extra_body={"num_inference_steps": 1},
    )
    url = reply.data[0].url
    assert url.startswith(f"data:image/{output_format};base64,")
    assert opened(url).format == output_format.upper()
    assert opened(url).size == (128, 64)


def test_equal_seeds_give_equal_images(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> bytes:
        reply: Any = client.images.generate(
            model="demo-image", prompt="a red circle", extra_body={"num_inference_steps": 4, "seed": seed}
        )
        assert reply.omni["seed"] == seed
        return opened(reply.data[0].b64_json).tobytes()

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_a_seed_that_was_told_draws_the_image_again(client: openai.OpenAI) -> None:
    said: Any = {"model": "demo-image", "prompt": "a red circle"}
    first: Any = client.images.generate(**said, extra_body={"num_inference_steps": 4})
    again: Any = client.images.generate(**said, extra_body={"num_inference_steps": 4, "seed": first.omni["seed"]})
    assert opened(first.data[0].b64_json).tobytes() == opened(again.data[0].b64_json).tobytes()


def test_chat_with_an_image_model(client: openai.OpenAI) -> None:
    body = {"height": 64, "width": 128, "num_inference_steps": 4, "guidance_scale": 2.0, "seed": 1}
    reply: Any = client.chat.completions.create(
        model="demo-image", messages=CIRCLE, extra_body=body | {"num_outputs_per_prompt": 2}
    )
    parts = reply.choices[0].message.content
    assert [part["type"] for part in parts] == ["image_url", "image_url"]
    assert opened(parts[0]["image_url"]["url"]).size == (128, 64)
    assert reply.omni["steps_computed"] == 4


def test_chat_with_an_image_model_streams(client: openai.OpenAI) -> None:
    body = {"num_inference_steps": 1, "seed": 1}
    stream = client.chat.completions.create(model="demo-image", messages=CIRCLE, stream=True, extra_body=body)
    role, drawing, end = list(stream)
    assert role.choices[0].delta.role == "assistant"
    part: Any = drawing.choices[0].delta.content[0]  # type: ignore[index]
    assert opened(part["image_url"]["url"]).size == (256, 256)
    assert end.choices[0].finish_reason == "stop"


def test_a_chain_tells_its_prompt_and_draws_it(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(model="demo-omni", messages=ASK, extra_body={"num_inference_steps": 4})
    text, image = reply.choices[0].message.content
    assert text["type"] == "text"
    assert "red circle" in text["text"]
    assert opened(image["image_url"]["url"]).size == (256, 256)
    assert reply.usage.completion_tokens > 0


def test_a_chain_on_the_images_path(client: openai.OpenAI) -> None:
    reply: Any = client.images.generate(
        model="demo-omni", prompt=ASK[0]["content"], extra_body={"num_inference_steps": 4}
    )
    assert "red circle" in reply.data[0].revised_prompt
    assert opened(reply.data[0].b64_json).size == (256, 256)


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="demo-chat, demo-image, demo-omni") as missing:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="demo-image", prompt="a red circle", size="250x250")
    assert bad.value.param == "size"
