"""A replica of two ranks on Ray: its pictures, and what becomes of its jobs when one rank dies or hangs."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import random
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from PIL import Image

from omni_ray.demo import scenes
from omni_ray.demo.check import reasons
from tests.conftest import Server, num_placement_groups, serving

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]

SPEC = """
http_options: {host: 127.0.0.1}
applications:
  - name: omni
    route_prefix: /
    import_path: omni_ray.app:build
    args:
      models:
        - {name: gang, type: dit, source: "demo:image", parallel: {ulysses: 2}}
"""
RANK = "ray::Rank"


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gang")
    (folder / "gang.yaml").write_text(SPEC)
    with serving(folder / "gang.yaml", folder / "log") as running:
        yield running


def draw(server: Server, seed: int) -> Image.Image:
    body = {"model": "gang", "prompt": "a red circle", "seed": seed}
    reply = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))


def test_two_ranks_draw_one_picture(gang: Server) -> None:
    gang.find(RANK, 2)
    assert not reasons(draw(gang, seed=1), scenes.parse("a red circle"))


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost(gang: Server, blow: signal.Signals) -> None:
    before = gang.find(RANK, 2)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        drawings = [pool.submit(draw, gang, seed) for seed in range(20)]
        time.sleep(2)
        victim = random.choice(before)
        victim.send_signal(blow)
        _, alive = psutil.wait_procs(before, timeout=8)
        assert not alive, "the ranks of a broken gang live on"
        for drawing in drawings:
            drawing.result()
    gang.wait_ready()
    gang.find(RANK, 2)
    assert num_placement_groups() == 1
