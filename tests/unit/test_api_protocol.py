"""What a body may say, how it becomes a job, and what is said of one that does not fit."""

from __future__ import annotations

import base64
import math
from typing import Any

import pytest

from omni_ray.api.chat import Reply, read_prompt
from omni_ray.api.jobs import Result
from omni_ray.api.limits import Inputs, make_job
from omni_ray.api.pipeline import Rewritten
from omni_ray.api.protocol import ChatRequest, ImagesRequest, parse
from omni_ray.errors import RequestError
from omni_ray.messages import Media, Route, Usage

LIMITS = {
    "output": "image",
    "fields": ["guidance_scale", "height", "num_inference_steps", "prompt", "prompt_2", "width"],
    "defaults": {"width": 256, "height": 256, "guidance_scale": 3.5, "prompt_2": "again"},
    "size_multiple": 16,
    "frame_multiple": 1,
    "max_pixels": 512 * 512,
    "room": None,
    "max_steps": 50,
    "max_outputs": 4,
    "max_frames": 1,
    "max_prompt_chars": 100,
    "edits": {},
    "needs": [],
}
VIDEO_LIMITS = LIMITS | {
    "output": "video",
    "fields": ["num_frames", "prompt", "image"],
    "frame_multiple": 4,
    "max_frames": 81,
}
PIXEL = base64.b64encode(b"any bytes").decode()


def route(limits: dict[str, Any] = LIMITS) -> Route:
    return Route(group="m:fast", name="m", profile="fast", type="dit", names=("m",), ready=True, limits=limits)


def images(**fields: Any) -> ImagesRequest:
    return parse(ImagesRequest, {"model": "m", "prompt": "a red circle"} | fields)


def job_of(
    limits: dict[str, Any] = LIMITS, pictures: tuple[bytes, ...] = (), mask: bytes | None = None, **fields: Any
) -> Any:
    request = images(**fields)
    return make_job(request, Inputs(prompt=request.prompt, images=pictures, mask=mask), route(limits), "r")


def chat(*content: Any, **fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": each} for each in content]
    return parse(ChatRequest, {"model": "m", "messages": messages} | fields)


def test_as_many_images_as_fit_into_memory_at_once() -> None:
    limits = LIMITS | {"room": {"alone": 512 * 512, "together": 3 * 256 * 256, "frames": 1}}
    assert job_of(limits, n=3).num_outputs == 3
    problem = "n: 4 x 256 x 256 pixels are more than the 196608 that fit into memory at once; ask for 3 at most"
    with pytest.raises(RequestError, match=problem):
        job_of(limits, n=4)


def test_as_many_frames_as_fit_into_memory_at_once() -> None:
    own = {"fields": [*LIMITS["fields"], "num_frames"], "defaults": LIMITS["defaults"] | {"num_frames": 5}}
    room = {"alone": 2 * 256 * 256, "together": 3 * 256 * 256, "frames": 5}
    limits = VIDEO_LIMITS | own | {"room": room}
    assert job_of(limits, num_frames=9, size="256x256").params["num_frames"] == 9
    problem = "num_frames: 13 frames of 256 x 256 pixels are more than the 655360 pixels .*; ask for 9 at most"
    with pytest.raises(RequestError, match=problem):
        job_of(limits, num_frames=13, size="256x256")
    assert job_of(limits, num_frames=13, size="128x128").params["num_frames"] == 13
    assert job_of(limits, n=3, size="256x256").num_outputs == 3
    problem = "n: 4 x 256 x 256 pixels are more than the 196608 that fit into memory at once; ask for 3 at most"
    for frames in (1, 5):  # short ones need no less to be decoded
        with pytest.raises(RequestError, match=problem):
            job_of(limits, n=4, size="256x256", num_frames=frames)
    with pytest.raises(RequestError, match=r"n: 3 x 256 x 256 pixels are more than the 65536 .*; ask for 1 at most"):
        job_of(limits, n=3, size="256x256", num_frames=9)


def test_a_request_becomes_a_job() -> None:
    job = job_of(size="128x64", n=2, seed=7, num_inference_steps=8, output_format="jpeg", output_compression=80)
    assert job.id.startswith("r-")
    assert (job.group, job.num_outputs, job.seed, job.format, job.compression) == ("m:fast", 2, 7, "jpeg", 80)
    assert job.params == {"prompt": "a red circle", "width": 128, "height": 64, "num_inference_steps": 8}


def test_nothing_said_leaves_all_to_the_pipeline() -> None:
    job = job_of(size="auto", seed=None)
    assert job.params == {"prompt": "a red circle"}
    assert (job.num_outputs, job.format) == (1, "png")
    assert 0 <= job.seed < 2**32
    assert job_of().seed != job.seed
    assert job_of(VIDEO_LIMITS).format == "mp4"


def test_two_jobs_of_one_request_id_differ() -> None:
    assert job_of().id != job_of().id


def test_extra_body_counts_as_the_body() -> None:
    request = chat("hi", extra_body={"seed": 3, "num_outputs_per_prompt": 2}, height=64)
    assert (request.seed, request.num_outputs, request.height) == (3, 2, 64)
    with pytest.raises(RequestError, match="seed: extra_body says something else"):
        chat("hi", seed=1, extra_body={"seed": 2})


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale", "finite number, not nan"),
        ({"guidance_scale": math.inf}, "guidance_scale", "finite number, not inf"),
        ({"guidance_scale": "3"}, "guidance_scale", "valid number, not '3'"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1, not 0"),
        ({"num_inference_steps": True}, "num_inference_steps", "valid integer, not True"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1, "num_outputs_per_prompt": 2}, None, "n contradicts num_outputs_per_prompt"),
        ({"size": "0x256"}, "size", "'0x256' is neither WIDTHxHEIGHT"),
        ({"size": "256x256", "width": 128}, None, "size 256x256 contradicts width 128"),
        ({"prompt": None}, "prompt", "valid string, not None"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"quality": "hd"}, "quality", "'auto' or 'standard', not 'hd'"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"extra_body": 3}, "extra_body", "3 is not an object"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        images(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "250x256"}, "size", "250 is no multiple of 16; 256 is"),
        ({"width": 8}, "width", "8 is no multiple of 16; 16 is"),
        (
            {"height": 4096},
            "height",
            "256 x 4096 = 1048576 pixels are more than the 262144 that are taken; 512x512 fits",
        ),
        ({"num_inference_steps": 10**9}, "num_inference_steps", "1000000000 is more than 50"),
        ({"n": 5}, "n", "5 is more than 4"),
        ({"num_outputs_per_prompt": 5}, "num_outputs_per_prompt", "5 is more than 4"),
        ({"prompt": " \n"}, "prompt", "is empty"),
        ({"prompt": "x" * 101}, "prompt", "has 101 characters, at most 100"),
        (
            {"strength": 0.5},
            "strength",
            "is not taken by the pipeline of this model, which takes guidance_scale, height",
        ),
        ({"guidence_scale": 3}, "guidence_scale", r"no field of this request \(did you mean guidance_scale\?\)"),
        ({"zzz": 3}, "zzz", "its pipeline takes guidance_scale"),
        ({"prompt_2": 3}, "prompt_2", "3 is not of the kind of its default 'again'"),
        ({"prompt_2": ["a"]}, "prompt_2", "not of the kind"),
        ({"output_format": "mp4"}, "output_format", "choose from png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "is for jpeg and webp"),
        ({"modalities": ["text"]}, "modalities", "has no image"),
    ],
)
def test_what_the_model_cannot_do_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        job_of(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_fields_of_this_pipeline_alone_pass() -> None:
    assert job_of(prompt_2="and a square").params["prompt_2"] == "and a square"


def test_an_error_names_every_field() -> None:
    with pytest.raises(RequestError, match=r"n: .*; seed: ") as caught:
        images(n=0, seed=-1)
    assert caught.value.param == "n"


def test_an_error_stays_short() -> None:
    with pytest.raises(RequestError) as caught:
        images(n="x" * 2**20)
    assert len(caught.value.message) < 300


def test_frames_and_input_images() -> None:
    assert job_of(VIDEO_LIMITS, (b"png",), num_frames=9).images == (b"png",)
    with pytest.raises(RequestError, match="num_frames: 10 is not 1 more than a multiple of 4; 9 is"):
        job_of(VIDEO_LIMITS, num_frames=10)
    with pytest.raises(RequestError, match="image: is not taken"):
        job_of(LIMITS, (b"png",))


@pytest.mark.parametrize(
    ("images", "mask", "message"), [((), None, "image: is missing"), ((b"png",), None, "mask: is missing")]
)
def test_what_a_pipeline_cannot_do_without(images: tuple[bytes, ...], mask: bytes | None, message: str) -> None:
    limits = LIMITS | {"fields": [*LIMITS["fields"], "image", "mask"], "needs": ["image", "mask"]}  # type: ignore[misc]
    with pytest.raises(RequestError, match=message):
        job_of(limits, images, mask)
    assert job_of(limits, (b"png",), b"mask").mask == b"mask"


def test_the_pipelines_that_edit_take_other_fields() -> None:
    limits = LIMITS | {"edits": {"image": [*LIMITS["fields"], "image", "strength"]}}  # type: ignore[misc]
    assert job_of(limits, (b"png",), strength=0.5).params["strength"] == 0.5
    with pytest.raises(RequestError, match="strength: is not taken by the pipeline"):
        job_of(limits, strength=0.5)
    with pytest.raises(RequestError, match="mask: is not taken"):
        job_of(limits, (b"png",), b"mask")


def test_the_last_user_message_is_the_prompt() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "text", "text": "b"},
    ]
    assert read_prompt(chat("first", parts)) == ("a\nb", (b"any bytes",))
    assert read_prompt(chat(parts, "last")) == ("last", ())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "ftp://x/y.png"}}, "is neither"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}, "the base64 is broken"),
        ({"type": "input_audio"}, "type 'input_audio' is none of text, image_url"),
        ({"type": "text"}, "needs the key text"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"messages\.0\.content\.0.*{message}"):
        read_prompt(chat([part]))


def test_content_of_the_wrong_kind_is_named_without_the_union() -> None:
    with pytest.raises(RequestError, match=r"^messages\.0\.content: input should be a valid list, not 5$"):
        chat(5)


def test_messages_without_a_user_are_refused() -> None:
    request = parse(ChatRequest, {"model": "m", "messages": [{"role": "system", "content": "x"}]})
    with pytest.raises(RequestError, match="none is by the user"):
        read_prompt(request)


async def test_a_reply_whole_and_in_chunks() -> None:
    usage = Usage(job_id="j", seed=3, steps_computed=8, steps_skipped=0, device_s=1.0, queue_s=0.0, run_s=1.0)
    media = Media(job_id="j", index=0, format="png", data=b"any bytes", width=16, height=16)
    steps = (Rewritten("a red circle", {"prompt_tokens": 5}), Result(route(), (media,), usage))
    reply = Reply(chat("hi", stream_options={"include_usage": True}), "r")
    whole = reply.whole([part for step in steps for part in reply.add(step)])
    text, image = whole["choices"][0]["message"]["content"]
    assert text == {"type": "text", "text": "a red circle"}
    assert image == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    assert (whole["usage"], whole["omni"]["seed"], whole["omni"]["profile"]) == ({"prompt_tokens": 5}, 3, "fast")

    async def rest() -> Any:
        yield steps[1]

    chunks = [chunk async for chunk in reply.chunks(steps[0], rest())]
    assert len(chunks) == 6
    assert b'"role":"assistant"' in chunks[0]
    assert b'"finish_reason":"stop"' in chunks[3]
    assert b'"usage":{"prompt_tokens":5}' in chunks[4]
    assert chunks[5] == b"data: [DONE]\n\n"
