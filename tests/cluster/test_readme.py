"""The README's requests, copied as they stand, against the server that its first command starts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from tests.conftest import ROOT, Server

pytestmark = pytest.mark.cluster

ADDRESS = "http://127.0.0.1:8000"


def requests() -> dict[str, str]:
    """The README's requests by the model that they name."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [text for block in blocks for text in re.split(r"\n\n", block) if "curl -s" in text]
    return {re.findall(r'model(?:": "|=)([\w-]+)', text)[0]: text for text in lines}


def run(model: str, server: Server, folder: Path) -> str:
    """What the request prints; the files that it writes are in ``folder``."""
    command = requests()[model]
    assert ADDRESS in command
    command = command.replace(ADDRESS, server.url)
    return subprocess.run(
        ["sh", "-euc", command], cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_chat(server: Server, tmp_path: Path) -> None:
    reply = json.loads(run("demo-chat", server, tmp_path))
    assert reply["choices"][0]["message"]["content"] == "a red circle on a blue background"


def test_image(server: Server, tmp_path: Path) -> None:
    run("demo-image", server, tmp_path)
    assert not reasons(opened(tmp_path / "circle.png"), scenes.parse("a red circle"))


def test_chain(server: Server, tmp_path: Path) -> None:
    caption = run("demo-omni", server, tmp_path).strip()
    assert caption == "a red circle on a blue background"
    assert not reasons(opened(tmp_path / "tomato.png"), scenes.parse(caption))


def test_video(server: Server, tmp_path: Path) -> None:
    events = [line for line in run("demo-video", server, tmp_path).splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["status"] == "completed"
    assert (tmp_path / "moving.mp4").read_bytes()[4:8] == b"ftyp"
