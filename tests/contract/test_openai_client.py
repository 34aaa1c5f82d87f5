"""The official openai client against the real server, its calls unchanged."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import av
import httpx
import numpy as np
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
    assert kinds == {"demo-chat": "ar", "demo-image": "dit", "demo-omni": "pipeline", "demo-video": "dit"}
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


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one.convert("RGB"), dtype=float) - np.asarray(other.convert("RGB"), dtype=float)
    return float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-6)))


def test_a_streamed_image_sharpens(client: openai.OpenAI) -> None:
    events = list(client.images.generate(model="demo-image", prompt="a red circle", stream=True, partial_images=3))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    *previews, final = [opened(event.b64_json) for event in events]
    assert {preview.size for preview in previews} == {final.size}
    likeness = [psnr(preview, final) for preview in previews]
    assert likeness[0] < likeness[1] < likeness[2]


def test_progress_is_told_where_it_is_wanted(client: openai.OpenAI) -> None:
    wanted: Any = {"progress": True, "num_inference_steps": 4}
    events = list(client.images.generate(model="demo-image", prompt="a red circle", stream=True, extra_body=wanted))
    told: Any = [event for event in events if event.type.endswith(".progress")]  # type: ignore[comparison-overlap]
    assert [(each.step, each.num_steps) for each in told if each.state == "running"] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(each.seconds_left >= 0 for each in told)


def test_a_streamed_chat_shows_previews(client: openai.OpenAI) -> None:
    chunks: Any = client.chat.completions.create(
        model="demo-omni", messages=ASK, stream=True, extra_body={"partial_images": 2}
    )
    parts = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.content or ()]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "image_url"]
    first, _, final = [opened(part["image_url"]["url"]) for part in parts[1:]]
    assert psnr(first, final) < 60


def test_an_image_is_edited(client: openai.OpenAI) -> None:
    source = client.images.generate(model="demo-image", prompt="a red circle", extra_body={"seed": 1}).data
    assert source
    picture = ("picture.png", base64.b64decode(source[0].b64_json or ""), "image/png")
    strengths: dict[str, Image.Image] = {}
    for strength in ("0.2", "0.9"):
        edited = client.images.edit(
            model="demo-image", prompt="a blue square", image=picture, extra_body={"strength": strength, "seed": "1"}
        ).data
        assert edited
        strengths[strength] = opened(edited[0].b64_json or "")
    before = opened(source[0].b64_json or "")
    assert psnr(strengths["0.2"], before) > psnr(strengths["0.9"], before)


def test_a_picture_of_more_than_4_mib_is_edited(client: openai.OpenAI) -> None:
    """Which is the most that gRPC takes in one message, if nobody tells it otherwise."""
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)).save(noise, "PNG")
    assert len(noise.getvalue()) > 5 * 2**20
    edited = client.images.edit(
        model="demo-image", prompt="a red circle", image=("noise.png", noise.getvalue(), "image/png"), size="256x256"
    ).data
    assert edited
    assert opened(edited[0].b64_json or "").size == (256, 256)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_video_is_made_polled_listed_downloaded_and_deleted(client: openai.OpenAI) -> None:
    video = client.videos.create(model="demo-video", prompt="a red circle moving right")
    assert video.status in ("queued", "in_progress")
    seen = [video.progress]
    while video.status in ("queued", "in_progress"):
        video = client.videos.retrieve(video.id)
        seen.append(video.progress)
    assert (video.status, video.progress) == ("completed", 100)
    assert seen == sorted(seen)
    assert video.id in [each.id for each in client.videos.list()]
    with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert f"{frames[0].shape[1]}x{frames[0].shape[0]}" == video.size
    assert (frames[0] != frames[-1]).any()
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no job"):
        client.videos.retrieve(video.id)


def test_an_image_is_a_job_where_that_is_wanted(client: openai.OpenAI) -> None:
    asked: Any = {"async": True, "seed": 3}
    made = client.post(
        "/images/generations", body={"model": "demo-image", "prompt": "a red circle", **asked}, cast_to=httpx.Response
    )
    assert made.status_code == 202
    path = f"/jobs/{made.json()['id']}"
    while (job := client.get(path, cast_to=httpx.Response).json())["status"] in ("queued", "in_progress"):
        pass
    assert (job["status"], job["progress"], job["step"]) == ("completed", 100, 20)
    content = client.get(f"{path}/content", cast_to=httpx.Response).content
    plain = client.images.generate(model="demo-image", prompt="a red circle", extra_body={"seed": 3}).data
    assert plain
    assert psnr(Image.open(io.BytesIO(content)), opened(plain[0].b64_json or "")) > 45
