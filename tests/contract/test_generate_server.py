"""`omni-ray generate` against the real server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from tests.conftest import Server

CAPTION = "a red circle on a blue background"
WISH = "could you draw something round, the colour of a tomato, on the sea"


def start(server: Server, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "omni_ray.cli", "generate", "--url", server.url, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_text(server: Server) -> None:
    assert end(start(server, WISH, "--model", "demo-chat", "--temperature", "0")) == (0, f"{CAPTION}\n", "")


def test_an_image_of_a_chain(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "tomato.png"
    code, out, err = end(start(server, WISH, "--model", "demo-omni", "--seed", "1", "--output", str(file)))
    assert (code, out) == (0, f"{file}\n")
    assert f"prompt: {CAPTION}" in err
    assert "seed 1, " in err
    with Image.open(file) as image:
        assert not reasons(image, scenes.parse(CAPTION))


def test_an_edit(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "blue.png"
    Image.new("RGB", (256, 256), (30, 60, 200)).save(file)
    options = ["--image", str(file), "--strength", "0.9", "--steps", "10", "--output", f"{tmp_path}/"]
    code, _, err = end(start(server, CAPTION, "--model", "demo-image", *options))
    assert code == 0, err
    assert "9 steps computed" in err


def test_ctrl_c_ends_the_work(server: Server, tmp_path: Path) -> None:
    process = start(server, CAPTION, "--model", "demo-image", "--steps", "200", "--output", str(tmp_path))
    job = wait_for(server, "in_progress")
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "cancelled\n")
    assert httpx.get(f"{server.url}/v1/jobs/{job}", timeout=10).json()["status"] == "cancelled"
    assert not list(tmp_path.iterdir())


def wait_for(server: Server, status: str) -> str:
    """The id of the newest job, when it is in ``status``."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        jobs = httpx.get(f"{server.url}/v1/jobs", params={"limit": 1}, timeout=10).json()["data"]
        if jobs and jobs[0]["status"] == status:
            return str(jobs[0]["id"])
        time.sleep(0.2)
    pytest.fail(f"no job is {status}")
