"""The load generator: its parts, and the whole command against a small server."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.serving.arrivals import arrival_times
from benchmarks.serving.flags import parser, workload
from benchmarks.serving.limits import find_problems
from benchmarks.serving.load import Run
from benchmarks.serving.outcome import Estimate, Outcome
from benchmarks.serving.report import peak_in_flight, statistics, summarise
from benchmarks.serving.request import Request
from benchmarks.serving.sse import Decoder
from benchmarks.serving.trace import read_trace, write_trace
from tests.conftest import ROOT

NUM_TOKENS = 5
GAP_S = 0.02


def outcome(index: int, sent_s: float, end_s: float, **more: Any) -> Outcome:
    return Outcome(index, "m", "images", "m", sent_s=sent_s, end_s=end_s, **more)


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    times = arrival_times(20_000, rate=50.0, seed=1)
    gaps = [late - early for early, late in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.03)
    assert times == sorted(times) == arrival_times(20_000, rate=50.0, seed=1)


def test_burstiness_changes_the_spread_alone() -> None:
    even = arrival_times(20_000, rate=50.0, burstiness=4.0)
    gaps = [late - early for early, late in itertools.pairwise(even)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean / 2, rel=0.05)


def test_infinite_rate_is_a_burst() -> None:
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="rate 0 and burstiness 1"):
        arrival_times(3, 0.0)


def test_statistics() -> None:
    found = statistics([*range(1, 102)])
    assert found == {"mean": 51.0, "p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert statistics([]) == {"mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0}


@pytest.mark.parametrize("cut", range(1, 12))
def test_events_come_whole_however_they_are_cut(cut: int) -> None:
    body = (
        b'event: a\r\ndata: {"x": 1}\r\n\r\n: a comment\n\n'
        b"data:first\ndata: second\n\nid: 7\n\ndata: [DONE]\n\ndata: unfinished"
    )
    decoder = Decoder()
    pieces = [body[start : start + cut] for start in range(0, len(body), cut)]
    assert [data for piece in pieces for data in decoder.feed(piece)] == [b'{"x": 1}', b"first\nsecond", b"[DONE]"]


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    flags = ["--dataset", "mixed", "--model", "chat=a", "images=b", "--request-rate", "3", "--num-prompts", "40"]
    made = workload(parser(None).parse_args(flags))
    assert {request.kind for request in made} == {"chat", "images"}
    write_trace(made, tmp_path / "trace.jsonl")
    read = read_trace(tmp_path / "trace.jsonl")
    assert [request.body for request in read] == [request.body for request in made]
    assert [request.at_s for request in read] == pytest.approx([request.at_s for request in made], abs=1e-6)
    replay = ["--dataset", "trace", "--dataset-path", str(tmp_path / "trace.jsonl"), "--model", "chat=other"]
    assert {request.model for request in workload(parser(None).parse_args(replay))} == {"other", "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"at_s": 1}', "a request has at_s, body, kind; here came at_s"),
        ('{"at_s": 0.5, "kind": "chat", "body": {}}', "at_s 0.5 has to be a number of seconds, and at least 1"),
        ('{"at_s": 2, "kind": "music", "body": {}}', "kind 'music' is unknown"),
        ("hello", "Expecting value"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 1, "kind": "chat", "body": {}}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"trace.jsonl:2: {message}"):
        read_trace(file)


def test_image_sizes_have_their_weights() -> None:
    made = workload(parser(None).parse_args(["--dataset", "images", "--model", "m", "--num-prompts", "4000"]))
    sizes = [(request.body["size"], request.body["num_inference_steps"]) for request in made]
    for shape, weight in {("512x512", 20): 0.15, ("1024x1024", 25): 0.45, ("1536x1536", 35): 0.15}.items():
        assert sizes.count(shape) / 4000 == pytest.approx(weight, abs=0.03)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset images --model a b", "needs one model, here came 2"),
        ("--dataset mixed --model demo-chat", "has to be KIND="),
        ("--dataset mixed --model chat=a images=b --mix chat=1", "--mix names chat, but --model has chat, images"),
        ("--dataset images --model a --size 256", "has to be WxH"),
        ("--dataset images --model a --size 256x256 --steps 1 2", "2 numbers for 1 sizes"),
        ("--dataset videos --model a --size 256x256", "take --video-size"),
        ("--dataset trace", "needs --dataset-path"),
    ],
)
def test_wrong_flags_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(parser(None).parse_args(flags.split()))


def test_what_the_server_cannot_do_is_told_beforehand() -> None:
    limits = {"output": "image", "max_pixels": 256 * 256, "size_multiple": 16, "max_steps": 50}
    served = [{"id": "dit", "type": "dit", "limits": limits}, {"id": "llm", "type": "ar", "limits": {}}, {"id": "bare"}]

    def problems(kind: Any, **body: Any) -> str:
        return "; ".join(find_problems([Request(kind, body)], served))

    assert problems("images", model="dit", size="256x256", num_inference_steps=20) == ""
    assert problems("images", model="bare", size="4096x4096") == ""
    assert "512x512 is 262144 pixels, at most 65536 are taken; set --size" in problems(
        "images", model="dit", size="512x512"
    )
    assert "no multiple of 16" in problems("images", model="dit", size="250x250")
    assert "num_inference_steps 60 is more than 50" in problems("images", model="dit", num_inference_steps=60)
    assert "type ar, which answers no images" in problems("images", model="llm")
    assert "makes images, not videos" in problems("videos", model="dit")
    assert "no model 'dat'; it has bare, dit, llm" in problems("images", model="dat")


def test_slo_counts_what_failed_as_missed() -> None:
    outcomes = [
        outcome(0, 0, 1),
        outcome(1, 1, 3.9),
        outcome(2, 1, 4.5),
        outcome(3, 0, 0.1, failure="HTTP 500", status=500),
    ]
    row = summarise(Run(outcomes, 5.0), {"m": 3.0}, None, {"m": 1.0})
    assert row["slo_attainment"] == 0.5
    assert row["classes"]["m"]["slo_attainment"] == 0.5
    assert row["completed"] == 3
    assert row["failed"] == {"HTTP 500": 1}
    assert row["req/s"] == pytest.approx(3 / 5)


def test_refusals_and_estimates_are_held_against_what_happened() -> None:
    refused = {"failure": "HTTP 429", "status": 429}
    outcomes = [
        outcome(0, 0.0, 8.0, end_estimate=Estimate(4.0, 8.0)),
        outcome(1, 1.0, 1.0, retry_after_s=2.0, **refused),
        outcome(1, 3.0, 9.0, attempt=1, end_estimate=Estimate(9.0, 6.0)),
        outcome(2, 4.0, 4.0, **refused),
        outcome(3, 5.0, 9.0),
        outcome(4, 0.5, 0.9),
    ]
    row = summarise(Run(outcomes, 9.0), {}, 4, {})
    assert row["completed"] == 4
    assert row["failed"] == {"HTTP 429": 1}
    assert row["refusals"] == {
        "num": 2,
        "without_retry_after": 1,
        "retry_after_s": {"mean": 2.0, "p50": 2.0, "p95": 2.0, "p99": 2.0},
        "ratio_p50": 1.0,
        "came_again": {"num": 1, "taken": 1},
    }
    assert row["estimates"] == {"end": {"num": 2, "ratio_p50": 1.0}}
    assert peak_in_flight(outcomes) == 3


class TinyServer:
    """Chat that streams NUM_TOKENS tokens, images with progress, and a 429 for every third chat that comes first."""

    def __init__(self) -> None:
        self.num_chats = 0
        self.application = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/images/generations", self.image, methods=["POST"]),
                Route("/v1/videos", self.video, methods=["POST"]),
                Route("/v1/videos/{id}", self.video),
                Route("/v1/videos/{id}/content", self.content),
            ]
        )
        self.polls: dict[str, int] = {}

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"data": [{"id": name} for name in ("llm", "dit", "film")]})

    async def chat(self, request: HttpRequest) -> Response:
        body = await request.json()
        again = body["messages"][0]["content"].startswith("warm up")
        self.num_chats += not again
        if not again and self.num_chats % 3 == 0:
            return JSONResponse({"error": {"code": "overloaded"}}, 429, {"Retry-After": "1"})
        usage = {"prompt_tokens": 7, "completion_tokens": NUM_TOKENS}
        if not body.get("stream"):
            return JSONResponse({"choices": [{"message": {"content": "hello"}}], "usage": usage})

        async def events() -> AsyncIterator[str]:
            yield _event(choices=[{"delta": {"role": "assistant", "content": ""}}])
            for _ in range(NUM_TOKENS):
                await asyncio.sleep(GAP_S)
                yield _event(choices=[{"delta": {"content": "hello "}}])
            yield _event(choices=[], usage=usage) + "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def image(self, request: HttpRequest) -> Response:
        body = await request.json()
        if not body.get("stream"):
            return JSONResponse({"data": [{"b64_json": "aGVsbG8="}]})

        async def events() -> AsyncIterator[str]:
            kind = "image_generation.progress"
            yield _event(type=kind, state="queued", position=0, start_s=0.6, seconds_left=1.2)
            await asyncio.sleep(0.3)
            yield _event(type=kind, state="running", position=None, start_s=0, seconds_left=0.6)
            await asyncio.sleep(0.3)
            yield _event(type="image_generation.completed", b64_json="aGVsbG8=")

        return StreamingResponse(events(), media_type="text/event-stream")

    async def video(self, request: HttpRequest) -> Response:
        if request.method == "POST":
            form = await request.form()
            assert form["model"] == "film"
            return JSONResponse({"id": "video_1", "status": "queued", "seconds_left": 0.5})
        self.polls[request.path_params["id"]] = seen = self.polls.get(request.path_params["id"], 0) + 1
        return JSONResponse({"id": "video_1", "status": "completed" if seen % 2 == 0 else "in_progress"})

    async def content(self, _: HttpRequest) -> Response:
        return Response(b"mp4", media_type="video/mp4")


def _event(**data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


@pytest.fixture(scope="module")
def tiny_server() -> Iterator[int]:
    """The port of a TinyServer."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(TinyServer().application, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def bench(port: int, flags: str, folder: Path, status: int = 0) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its row."""
    rows = folder / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.serving", "--port", str(port), "--json", str(rows), "--clients", "2"]
    ran = subprocess.run([*command, *flags.split()], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert ran.returncode == status, ran.stderr
    return ran.stdout + ran.stderr, json.loads(rows.read_text().splitlines()[-1]) if rows.exists() else {}


def test_the_command_streams_chat_and_counts_429s(tiny_server: int, tmp_path: Path) -> None:
    flags = f"--model llm --num-prompts 12 --request-rate 40 --slo-scale 50 --plot {tmp_path}/plot.png"
    printed, row = bench(tiny_server, flags, tmp_path)
    assert row["completed"] == 8
    assert row["failed"] == {"HTTP 429": 4}
    assert row["refusals"]["retry_after_s"]["p50"] == 1.0
    assert row["duration_s"] > arrival_times(12, 40.0)[-1]
    assert row["slo_attainment"] == pytest.approx(8 / 12)
    assert row["tok/s"] == pytest.approx(NUM_TOKENS * row["req/s"])
    for gap in ("ttft", "itl", "tpot"):
        assert 1e3 * GAP_S * 0.9 < row[f"{gap}_p50_ms"] < 1e3 * NUM_TOKENS * GAP_S, gap
    taken_s = row["ttft_mean_ms"] / 1e3 + (NUM_TOKENS - 1) * row["tpot_mean_ms"] / 1e3
    assert row["e2e_mean_s"] == pytest.approx(taken_s)
    assert "8 of 12 requests" in printed
    assert 'failed: 4 x HTTP 429  {"error":{"code":"overloaded"}}' in printed
    assert "12/12" in printed  # the progress bar
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 800


def test_a_refused_request_comes_again_after_its_retry_after(tiny_server: int, tmp_path: Path) -> None:
    _, row = bench(tiny_server, "--model llm --num-prompts 4 --max-concurrency 1 --retries 3 --plain", tmp_path)
    assert row["completed"] == 4
    assert row["failed"] == {}
    assert row["refusals"]["came_again"]["taken"] == row["refusals"]["came_again"]["num"] >= 1
    assert row["duration_s"] > 1
    assert row["peak_in_flight"] == 1


def test_images_are_held_against_their_estimates(tiny_server: int, tmp_path: Path) -> None:
    flags = "--model dit --dataset images --size 256x256 --num-prompts 4 --progress"
    printed, row = bench(tiny_server, flags, tmp_path)
    assert row["img/s"] == pytest.approx(row["req/s"])
    for name in ("start", "end"):
        assert row["estimates"][name]["num"] == 4
        assert 0.5 < row["estimates"][name]["ratio_p50"] < 3, name
    assert "first estimate of the end" in printed


def test_mixed_traffic_with_videos(tiny_server: int, tmp_path: Path) -> None:
    flags = "--dataset mixed --model images=dit videos=film --num-prompts 6 --max-concurrency 1"
    _, row = bench(tiny_server, f"{flags} --num-frames 5 --size 256x256", tmp_path)
    assert row["completed"] == 6
    assert row["video/s"] > 0 < row["img/s"]
    assert set(row["classes"]) == {"dit 256x256", "film 5 frames"}


def test_nothing_is_sent_to_a_server_that_cannot_do_it(tiny_server: int, tmp_path: Path) -> None:
    assert "no model 'gpt'; it has dit, film, llm" in bench(tiny_server, "--model gpt", tmp_path, status=1)[0]
    assert "Cannot connect" in bench(1, "--model llm", tmp_path, status=1)[0]
