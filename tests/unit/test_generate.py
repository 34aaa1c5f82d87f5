"""`omni-ray generate`: from a prompt to text and files, in this process and from a server that speaks as ours does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from omni_ray.cli import main
from omni_ray.cli.generate import Asked, Step
from omni_ray.cli.local import run as run_local
from tests.ports import free_port

COST = {
    "seed": 7, "steps_computed": 3, "steps_skipped": 1, "device_s": 1.5, "queue_s": 0.25, "run_s": 2.0,
    "peak_memory_gib": 2.5, "cache": "teacache", "warnings": ["cache teacache: nothing could be skipped"],
}  # fmt: skip


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class Fake:
    """A server with an LLM `chat`, `draw`, `film` and a chain, whose jobs take three polls."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.num_polls = 0
        self.endless = False
        self.refusal: Response | None = None
        self.absent = 0  # polls that are answered 503
        paths = {
            ("/v1/models", "GET"): self.models,
            ("/v1/chat/completions", "POST"): self.chat,
            ("/v1/images/generations", "POST"): self.create,
            ("/v1/images/edits", "POST"): self.create,
            ("/v1/videos", "POST"): self.create,
            ("/v1/jobs/{id}", "GET"): self.poll,
            ("/v1/jobs/{id}/cancel", "POST"): self.cancel,
            ("/v1/jobs/{id}/content", "GET"): self.content,
        }
        self.app = Starlette(routes=[Route(path, call, methods=[method]) for (path, method), call in paths.items()])

    async def models(self, _: Request) -> Response:
        limits = {"draw": {"output": "image"}, "film": {"output": "video"}, "chain": {"generate": "draw"}}
        types = {"chat": "ar", "draw": "dit", "film": "dit", "chain": "pipeline"}
        data = [{"id": name, "type": type_, "limits": limits.get(name, {})} for name, type_ in types.items()]
        return JSONResponse({"data": data})

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        words = ["a ", "red ", "circle"]
        events = [{"choices": [{"delta": {"content": word}}]} for word in words]
        if self.asked[-1]["messages"][0]["content"] == "fail":
            events.append({"error": {"message": "the replica died"}})  # type: ignore[dict-item]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    async def create(self, request: Request) -> Response:
        if self.refusal:
            return self.refusal
        if request.headers["content-type"].startswith("multipart"):
            async with request.form() as form:
                said = {
                    name: value if isinstance(value, str) else len(await value.read())
                    for name, value in form.multi_items()
                }
        else:
            said = await request.json()
        self.asked.append(said | {"path": request.url.path})
        return JSONResponse(self._job(), 202)

    def _job(self) -> dict[str, Any]:
        said = self.asked[-1]
        step = self.num_polls
        status = "completed" if step > 3 and not self.endless else "in_progress" if step else "queued"
        job = {
            "id": "job_1", "model": said["model"], "status": status, "step": step, "num_steps": 4, "queue_position": 2,
            "seconds_left": 1.0, "num_outputs": int(said.get("n", 1)), "error": None, "omni": COST,
        }  # fmt: skip
        return job | ({"revised_prompt": "a red circle"} if said["model"] == "chain" else {})

    async def poll(self, _: Request) -> Response:
        if self.absent:
            self.absent -= 1
            return JSONResponse({"error": {"message": "loading"}}, 503)
        self.num_polls += 1
        return JSONResponse(self._job())

    async def cancel(self, request: Request) -> Response:
        self.cancelled.append(request.path_params["id"])
        return JSONResponse({})

    async def content(self, request: Request) -> Response:
        return Response(png(), media_type="video/mp4" if self.asked[-1]["path"] == "/v1/videos" else "image/png")


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def url(fake: Fake) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(fake.app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_ray.cli.remote.POLL_S", 0.01)


def run(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(["generate", *arguments])
    return end.value.code


def test_text_is_printed(url: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("paint it", "--url", url, "--model", "chat", "--max-tokens", "5") == 0
    assert capsys.readouterr().out == "a red circle\n"
    assert fake.asked[0]["max_tokens"] == 5


def on_a_terminal(*arguments: str) -> str:
    """What `omni-ray generate` writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "omni_ray.cli", "generate", *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs):
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal with an error
            while piece := os.read(ours, 4096):
                written += piece
        os.close(ours)
    return written.decode()


def test_on_a_terminal(url: str, tmp_path: Path) -> None:
    assert "\ra red circle\r\n" in on_a_terminal("paint it", "--url", url, "--model", "chat")
    drawn = on_a_terminal("x", "--url", url, "--model", "chain", "--output", f"{tmp_path}/")
    assert "queued, 2 before it |" in drawn
    assert re.search(r"\rchain \|█+.? *\| 3 of 4 steps, 1\.0 s left", drawn)
    assert "\rprompt: a red circle\r\n" in drawn


def test_images_are_files(url: str, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-n", "2", "--size", "16x16", "--steps", "4", "--guidance-scale", "3.5", "--seed", "7"]
    assert run("A red, round thing!", "--url", url, "--model", "draw", *options, "--output", f"{tmp_path}/new/") == 0
    expected = {"n": 2, "size": "16x16", "num_inference_steps": 4, "guidance_scale": 3.5, "seed": 7, "async": True}
    assert fake.asked[0].items() >= expected.items()
    told = capsys.readouterr()
    names = ["a-red-round-thing-7.png", "a-red-round-thing-7-2.png"]
    assert told.out.split() == [str(tmp_path / "new" / name) for name in names]
    assert "seed 7, 3 steps computed, 1 skipped, 1.50 s on the device, 0.25 s in the queue, 2.5 GiB at most" in told.err
    assert "warning: cache teacache: nothing could be skipped" in told.err
    assert (tmp_path / "new" / names[0]).read_bytes() == png()
    assert not fake.cancelled


def test_the_names_suffix_is_the_format(url: str, fake: Fake, tmp_path: Path) -> None:
    assert run("x", "--url", url, "--model", "draw", "--output", str(tmp_path / "out.jpg"), "-n", "2") == 0
    assert fake.asked[0]["output_format"] == "jpeg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.jpg", "out-1.jpg"]


def test_images_are_edited(url: str, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(png())
    files = ["--image", str(file), "--image", str(file), "--mask", str(file)]
    assert run("x", "--url", url, "--model", "draw", *files, "--output", str(tmp_path)) == 0
    assert fake.asked[0]["path"] == "/v1/images/edits"
    assert (fake.asked[0]["image"], fake.asked[0]["mask"], fake.asked[0]["async"]) == (len(png()), len(png()), "true")


def test_a_video_from_its_first_frame(url: str, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(png())
    options = ["--image", str(file), "--seconds", "2", "--fps", "8"]
    assert run("moves", "--url", url, "--model", "film", *options, "--output", str(tmp_path)) == 0
    said = {"path": "/v1/videos", "input_reference": len(png()), "seconds": "2.0", "fps": "8"}
    assert fake.asked[0].items() >= said.items()
    assert (tmp_path / "moves-7.mp4").exists()


def test_a_chain_tells_its_prompt(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("x", "--url", url, "--model", "chain", "--output", str(tmp_path)) == 0
    assert "prompt: a red circle" in capsys.readouterr().err


def test_a_server_that_restarts_is_waited_for(url: str, fake: Fake, tmp_path: Path) -> None:
    fake.absent = 3
    assert run("x", "--url", url, "--model", "draw", "--output", str(tmp_path)) == 0
    assert fake.absent == 0


def test_ctrl_c_cancels_the_job(url: str, fake: Fake) -> None:
    fake.endless = True
    command = [sys.executable, "-m", "omni_ray.cli", "generate", "x", "--url", url, "--model", "draw"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while fake.num_polls < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, fake.cancelled) == (130, ["job_1"]), said
    assert said == "cancelled\n"


def test_refusals_of_the_server_are_told(url: str, fake: Fake) -> None:
    fake.refusal = JSONResponse({"error": {"message": "the queue is full"}}, 429, {"Retry-After": "7"})
    assert run("x", "--url", url, "--model", "draw") == "the queue is full (try again in 7 s)"
    assert run("fail", "--url", url, "--model", "chat") == "the replica died"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "chat", "--steps", "3"], "chat writes text and takes no num_inference_steps"),
        (
            ["--model", "gpt"],
            "'gpt' is not served at URL; there is chat (ar), draw (dit), film (dit), chain (pipeline)",
        ),
        ([], "--model: which one is not said; there is chat (ar)"),
        (["--output", "a.gif"], "--output a.gif: .gif is none of .png"),
        (["--output", "/none/a.png"], "--output: there is no folder /none"),
        (["--image", "/none.png"], "/none.png: there is no such file"),
        (["--mask", __file__], "name it with --image"),
    ],
)
def test_what_is_wrong_is_said(url: str, arguments: list[str], message: str) -> None:
    assert message.replace("URL", url) in run("x", "--url", url, *arguments)


def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert run("x", "--url", url).startswith(f"no server answers at {url} (")


def test_a_pipeline_in_this_process(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--size", "32x32", "--steps", "2", "--seed", "5", "-n", "2", "--output", str(tmp_path / "a.webp")]
    assert run("a cat", "--local", str(tiny_folder("flux")), *options) == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(tmp_path / "a-0.webp"), str(tmp_path / "a-1.webp")]
    with Image.open(tmp_path / "a-1.webp") as image:
        assert (image.size, image.format) == ((32, 32), "WEBP")
    assert "seed 5, 2 steps computed" in told.err
    bad = run("a cat", "--local", str(tiny_folder("flux")), "--size", "30x32")
    assert bad == "size: 30 is no multiple of 16; 32 is"


def test_levers_in_this_process(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--size",
        "32x32",
        "--steps",
        "8",
        "--output",
        str(tmp_path / "a.png"),
        "--local",
        str(tiny_folder("flux")),
    ]
    levers = ["--enable-teacache", "--teacache-threshold", "1e9", "--quantization", "int8"]
    assert run("a cat", *options, *levers, "--enable-layerwise-cpu-offload") == 0
    assert "3 steps computed, 5 skipped" in capsys.readouterr().err
    assert "--enable-teecache is no flag of a dit model" in run("a cat", *options, "--enable-teecache")
    assert "--local runs one rank; leave the parallel axes out" in run("a cat", *options, "--usp", "2")


def test_a_video_in_this_process(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    options = ["--size", "32x32", "--steps", "2", "--seconds", "0.5", "--fps", "8", "--output", str(tmp_path / "a.mp4")]
    assert run("a cat", "--local", str(tiny_folder("wan")), *options) == 0
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert (container.streams.video[0].frames, container.streams.video[0].average_rate) == (5, 8)


def test_leaving_ends_the_work_in_this_process(tiny_folder: Callable[[str], Path]) -> None:
    asked = Asked("a cat", fields={"size": "32x32", "num_inference_steps": 200})
    with contextlib.closing(run_local(str(tiny_folder("flux")), asked)) as updates:
        steps = (each for each in updates if isinstance(each, Step))
        assert next(each.num_steps for each in steps if each.step == 2) == 200
        assert "engine-loop" in names_of_threads()
    assert "engine-loop" not in names_of_threads()


def names_of_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_an_llm_is_not_run_in_this_process() -> None:
    assert "demo:chat: is an LLM, and --local draws" in run("x", "--local", "demo:chat")
    assert "--local names the one to run" in run("x", "--local", "demo:image", "--model", "draw")
