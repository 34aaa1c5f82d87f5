"""API keys on a real server with two ingress replicas: limits hold over both, and each writes its audit log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from omni_ray.config.keys import hash_of, new_key
from tests.conftest import Server, serving

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]

ALICE, BOB = new_key(), new_key()
IMAGES = "/v1/images/generations"
CIRCLE = {"model": "demo-image", "prompt": "a red circle", "seed": 1}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    alice = {"name": "alice", "hash": hash_of(ALICE), "limits": {"requests_per_minute": 6}}
    bob = {"name": "bob", "hash": hash_of(BOB), "limits": {"outstanding_s": 0.001}}
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": [alice, bob]}))
    args = {
        "models": [{"name": "demo-image", "type": "dit", "source": "demo:image"}],
        "api": {"num_replicas": 2, "keys_file": str(folder / "keys.yaml")},
    }
    application = {"name": "omni", "route_prefix": "/", "import_path": "omni_ray.app:build", "args": args}
    (folder / "omni.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    with serving(folder / "omni.yaml", folder / "log") as running:
        yield running


def ask(server: Server, key: str, **more: object) -> httpx.Response:
    """Over a connection of its own, so that both replicas get some."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(server.url + IMAGES, json=CIRCLE | more, headers=headers, timeout=60)


def test_who_is_let_in(guarded: Server) -> None:
    for key in ("", "omni-wrong"):
        answer = ask(guarded, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(guarded.url + "/metrics").status_code == 401
    assert httpx.get(guarded.url + "/health").status_code == 200


def test_the_rate_is_that_of_both_replicas(guarded: Server) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(guarded, ALICE), range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429] * 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "requests_per_minute is 6" in refused.text
    assert 0 < int(refused.headers["retry-after"]) <= 60


def test_outstanding_seconds_are_those_of_both_replicas(guarded: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(guarded, BOB, num_inference_steps=50), range(4)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes.count(200) >= 1
    assert codes[-1] == 429
    assert "its limit outstanding_s is 0.001" in next(a for a in answers if a.status_code == 429).text


def test_the_audit_logs_tell_of_each_request(guarded: Server) -> None:
    answer = httpx.post(guarded.url + IMAGES, json=CIRCLE, headers={"x-api-key": BOB, "x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    said = re.search(r"logs are in (\S+)", guarded.log.read_text())
    assert said
    files = list(Path(said[1]).glob("audit_*.log"))
    assert len(files) == 2
    deadline = time.monotonic() + 10
    while not any('"mine"' in file.read_text() for file in files):  # the line is written after the answer
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    (mine,) = (line for line in lines if line["id"] == "mine")
    assert (mine["key"], mine["model"], mine["path"], mine["status"]) == ("bob", "demo-image", IMAGES, 200)
    assert sum(line["status"] == 429 and line["key"] == "alice" for line in lines) == 4
    assert "circle" not in json.dumps(lines)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
