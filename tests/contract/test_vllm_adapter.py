"""The AR replica on the installed vLLM, without Ray Serve: one engine of two tensor-parallel ranks for the whole
module, on a tiny checkpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import logging.handlers
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, get_args

import pytest
import pytest_asyncio

from omni_ray.config.spec import ArGroup, ArParallel, OmniSpec
from omni_ray.config.vllm_names import Quantization
from omni_ray.errors import ConfigError, Unavailable
from omni_ray.messages import HttpHead, HttpRequest
from omni_ray.replica.ar import ArReplica
from tests.tiny_ar import build_tiny_ar

pytest.importorskip("vllm")
pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
LONG = {"messages": MESSAGES, "max_tokens": 1500, "ignore_eos": True}
VERDICT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


LOG_OF_SERVE = logging.handlers.MemoryHandler(10)
"""As Ray Serve's; its target is None once it is closed."""


def spec_of(source: str, **engine_args: Any) -> OmniSpec:
    model = {"type": "ar", "name": "tiny", "profile": "exact", "source": source, "engine_args": engine_args}
    return OmniSpec.model_validate({"models": [model], "api": {"stream_interval_ms": 150}})


def group_of(spec: OmniSpec) -> ArGroup:
    (group,) = spec.models
    assert isinstance(group, ArGroup)
    return group


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ArReplica]:
    source = str(build_tiny_ar(tmp_path_factory.mktemp("tiny-ar")))
    spec = spec_of(
        source,
        max_model_len="2k",
        enforce_eager=True,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        enable_prefix_caching=False,
    )
    group = group_of(spec).model_copy(update={"parallel": ArParallel(tensor=2)})
    LOG_OF_SERVE.setTarget(logging.NullHandler())
    replica = ArReplica(spec, group, source)
    await replica.check_health()
    yield replica
    await replica.close()


async def post(replica: ArReplica, path: str, **body: Any) -> tuple[HttpHead, list[bytes]]:
    items = replica.http(http_request("POST", path, {"model": "tiny:exact", **body}))
    head = await anext(items)
    assert isinstance(head, HttpHead)
    return head, [piece async for piece in items if isinstance(piece, bytes)]


async def answer(replica: ArReplica, path: str, **body: Any) -> Any:
    head, pieces = await post(replica, path, **body)
    assert head.status == 200, pieces
    assert ("content-type", "application/json") in head.headers
    return json.loads(b"".join(pieces))


def http_request(method: str, path: str, body: dict[str, Any] | None = None) -> HttpRequest:
    headers = (("Content-Type", "application/json"),)
    return HttpRequest(method=method, path=path, headers=headers, body=json.dumps(body).encode() if body else b"")


def events(pieces: list[bytes]) -> list[Any]:
    lines = b"".join(pieces).decode().strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def seconds_until(true: Callable[[], bool], within_s: float) -> float:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < within_s
        await asyncio.sleep(0.002)
    return time.monotonic() - start


def unfinished(replica: ArReplica) -> int:
    assert replica._vllm is not None
    return replica._vllm.num_unfinished_requests


async def test_both_names_are_served(replica: ArReplica) -> None:
    items = [item async for item in replica.http(http_request("GET", "/v1/models"))]
    assert [card["id"] for card in json.loads(b"".join(items[1:]))["data"]] == ["tiny", "tiny:exact"]  # type: ignore[arg-type]


async def test_chat_is_the_same_plain_and_streamed(replica: ArReplica) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    plain = await answer(replica, CHAT, **asked)
    head, pieces = await post(replica, CHAT, **asked, stream=True, stream_options={"include_usage": True})
    chunks = events(pieces)
    assert ("content-type", "text/event-stream; charset=utf-8") in head.headers
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == plain["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] == 24


async def test_the_log_of_ray_serve_goes_on(replica: ArReplica) -> None:
    await replica.check_health()
    assert LOG_OF_SERVE.target is not None


async def test_chunks_are_joined(replica: ArReplica) -> None:
    _, pieces = await post(replica, CHAT, messages=MESSAGES, max_tokens=256, ignore_eos=True, stream=True)
    assert 1 < len(pieces) < len(events(pieces)) / 2


async def test_logprobs(replica: ArReplica) -> None:
    reply = await answer(replica, "/v1/completions", prompt="a", max_tokens=3, logprobs=2, ignore_eos=True)
    logprobs = reply["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 3


async def test_json_schema(replica: ArReplica) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}}
    reply = await answer(replica, CHAT, messages=MESSAGES, max_tokens=200, response_format=form)
    assert set(json.loads(reply["choices"][0]["message"]["content"])) == {"ok"}


async def test_tools(replica: ArReplica) -> None:
    tool = {"type": "function", "function": {"name": "judge", "parameters": VERDICT, "strict": True}}
    choice = {"type": "function", "function": {"name": "judge"}}
    reply = await answer(replica, CHAT, messages=MESSAGES, max_tokens=200, tools=[tool], tool_choice=choice)
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "judge"
    assert set(json.loads(call["function"]["arguments"])) == {"ok"}


async def test_tokenize(replica: ArReplica) -> None:
    assert (await answer(replica, "/tokenize", prompt="abc"))["count"] == 3


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ({"messages": MESSAGES, "temperature": -1, "stream": True}, 400, "temperature"),
        ({"messages": "no list"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 4000}], "stream": True}, 400, "context length"),
        ({"messages": MESSAGES, "model": "other"}, 404, "other"),
    ],
)
async def test_errors_are_openai_errors(replica: ArReplica, body: dict[str, Any], status: int, word: str) -> None:
    head, pieces = await post(replica, CHAT, **body)
    error = json.loads(b"".join(pieces))["error"]
    assert head.status == status
    assert word in error["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_lost_client_ends_its_request_and_no_other(replica: ArReplica, stream: bool, how: str) -> None:
    other = asyncio.create_task(answer(replica, CHAT, **{**LONG, "max_tokens": 400}))
    items = replica.http(http_request("POST", CHAT, {"model": "tiny", "stream": stream, **LONG}))
    first: asyncio.Task[HttpHead | bytes] = asyncio.create_task(_first(items))
    await seconds_until(lambda: unfinished(replica) == 2, within_s=5)
    if stream:
        assert isinstance(await first, HttpHead)
    if stream and how == "close":
        await items.aclose()
    elif stream:
        with pytest.raises(asyncio.CancelledError):
            await items.athrow(asyncio.CancelledError())
    else:
        first.cancel()
    assert await seconds_until(lambda: unfinished(replica) == 1, within_s=1) < 0.2
    assert (await other)["usage"]["completion_tokens"] == 400


async def _first(items: AsyncIterator[HttpHead | bytes]) -> HttpHead | bytes:
    return await anext(items)


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"max_modle_len": 8}, "max_modle_len.*nearest is max_model_len"),
        ({"port": 80}, "port has no meaning"),
        ({"max_model_len": "many"}, "max-model-len.*many"),
        ({"enforce_eager": 1}, "enforce_eager = 1: write true or false"),
        ({"seed": None}, "seed is null"),
        ({"allowed_media_domain": ["a.b"]}, "nearest is allowed_media_domains"),
        ({"enable_auto_tool_choice": True}, "requires --tool-call-parser"),
        ({"enable_auto_tool_choice": True, "tool_call_parser": "nope"}, "nope"),
    ],
)
async def test_bad_engine_args(engine_args: dict[str, Any], words: str) -> None:
    spec = spec_of("/somewhere", **engine_args)
    with pytest.raises(ConfigError, match=f"model 'tiny:exact': engine_args.*{words}"):
        await ArReplica(spec, group_of(spec), "/somewhere").check_health()


async def test_the_device_must_be_the_one_that_vllm_runs_on() -> None:
    from vllm.platforms import current_platform

    from omni_ray.replica.vllm_adapter import serve_args

    device = "cuda" if current_platform.is_cpu() else "cpu"
    group = group_of(spec_of("/somewhere")).model_copy(update={"device": device})
    with pytest.raises(ConfigError, match=f"device = '{device}'"):
        serve_args(group, "/somewhere")


async def test_engine_args_are_typed_by_vllm() -> None:
    from omni_ray.replica.vllm_adapter import serve_args

    given = {
        "max_model_len": "2k",
        "enable_prefix_caching": False,
        "hf_overrides": {"rope_theta": 1e4},
        "middleware": ["a.b", "c.d"],
        "max-num-seqs": 7,
    }
    args = serve_args(group_of(spec_of("/somewhere", **given)), "/somewhere")
    assert (args.model, args.served_model_name) == ("/somewhere", ["tiny", "tiny:exact"])
    assert (args.max_model_len, args.enable_prefix_caching, args.max_num_seqs) == (2000, False, 7)
    assert (args.hf_overrides, args.middleware) == ({"rope_theta": 1e4}, ["a.b", "c.d"])


async def test_the_groups_own_keys_become_flags() -> None:
    from omni_ray.replica.vllm_adapter import serve_args

    keys = {"load_format": "dummy", "dtype": "float32", "trust_remote_code": True, "quantization": "fp8"}
    args = serve_args(group_of(spec_of("/somewhere")).model_copy(update=keys), "/somewhere")
    assert {key: getattr(args, key) for key in keys} == keys


async def test_every_quantization_of_vllm_can_be_asked_for() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    assert set(QUANTIZATION_METHODS) <= set(get_args(Quantization))


@pytest.mark.parametrize(
    ("files", "keys", "load_format"),
    [
        (["model.safetensors"], {}, "safetensors"),
        (["consolidated.safetensors", "model.safetensors"], {}, "mistral"),
        (["pytorch_model.bin"], {}, "safetensors"),
        (["pytorch_model.bin"], {"allow_pickle_weights": True}, "auto"),
        (["pytorch_model.bin"], {"load_format": "runai_streamer"}, "runai_streamer"),
    ],
)
async def test_pickles_are_not_read(files: list[str], keys: dict[str, Any], load_format: str, tmp_path: Any) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from omni_ray.replica.vllm_adapter import serve_args

    for file in files:
        (tmp_path / file).touch()
    args = serve_args(group_of(spec_of("/somewhere")).model_copy(update=keys), str(tmp_path))
    assert args.load_format == load_format
    if "pytorch_model.bin" in files and load_format == "safetensors":
        with pytest.raises(RuntimeError, match="Cannot find any model weights"):
            DefaultModelLoader(LoadConfig(load_format=load_format))._prepare_weights(
                str(tmp_path), None, None, True, None
            )


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/a.png", "http://nothing.invalid@127.0.0.1:{}/a.png"])
async def test_vllm_fetches_nothing(url: str) -> None:
    from vllm.multimodal.media import MediaConnector

    from omni_ray.replica.vllm_adapter import serve_args

    args = serve_args(group_of(spec_of("/somewhere")), "/somewhere")
    hits = []
    server = await asyncio.start_server(lambda reader, writer: hits.append(writer.close()), "127.0.0.1", 0)
    connector = MediaConnector(
        allowed_media_domains=args.allowed_media_domains, allowed_local_media_path=args.allowed_local_media_path
    )
    async with server:
        with pytest.raises(ValueError, match="allowed domains"):
            await connector.fetch_image_async(url.format(server.sockets[0].getsockname()[1]))
    with pytest.raises(RuntimeError, match="allowed-local-media-path"):
        await connector.fetch_image_async("file:///etc/hostname")
    assert not hits


async def test_several_nodes_are_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_ray.replica import vllm_adapter

    spread = group_of(spec_of("/somewhere")).model_copy(update={"parallel": ArParallel(tensor=2, num_nodes=2)})
    if vllm_adapter.current_platform.is_cpu():
        with pytest.raises(ConfigError, match="num_nodes = 2, but vLLM spans nodes with GPUs alone"):
            vllm_adapter.serve_args(spread, "/somewhere")
        monkeypatch.setattr(type(vllm_adapter.current_platform), "is_cpu", lambda self: False)
    args = vllm_adapter.serve_args(spread, "/somewhere")
    assert (args.distributed_executor_backend, args.tensor_parallel_size) == ("ray", 2)


async def test_an_open_length_is_bounded(replica: ArReplica) -> None:
    async def num_tokens(most: int, **body: Any) -> int:
        request = http_request("POST", CHAT, {"model": "tiny:exact", "messages": MESSAGES, **body})
        items = replica.http(dataclasses.replace(request, bound=("max_completion_tokens", most)))
        head, *pieces = [item async for item in items]
        assert isinstance(head, HttpHead)
        assert head.status == 200, pieces
        return int(json.loads(b"".join(pieces))["usage"]["completion_tokens"])  # type: ignore[arg-type]

    assert await num_tokens(5, ignore_eos=True) == 5
    schema = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
    assert await num_tokens(10**6, response_format=schema) < 2048


async def test_a_dead_rank_makes_the_replica_unavailable(replica: ArReplica) -> None:
    """Last in the module: it kills the engine."""
    import psutil  # type: ignore[import-untyped]

    streams = [asyncio.create_task(post(replica, CHAT, **LONG)) for _ in range(2)]
    await seconds_until(lambda: unfinished(replica) == 2, within_s=5)
    (engine,) = (p for p in psutil.Process().children() if p.cmdline()[0].startswith("VLLM::EngineCore"))
    os.kill(engine.children()[-1].pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(stream, 15)
    with pytest.raises(Unavailable):
        await replica.check_health()
    with pytest.raises(Unavailable):
        await post(replica, CHAT, messages=MESSAGES)
