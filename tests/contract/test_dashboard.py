"""Every query of the Grafana dashboard, on a real Prometheus that scrapes the running server."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from omni_ray import metrics
from tests.conftest import Server
from tests.dashboard import FILE
from tests.ports import free_port

pytestmark = pytest.mark.cluster

DEADLINE_S = 180.0
"""Ray exports every 10 s, and a rate needs two scrapes."""

NOTHING_HERE = {
    metrics.OFFLOAD_S.shown: "the demo's models are not offloaded",
    metrics.REFUSED.shown: "the queue is never full",
}
"""Metrics that need have no value on this server, and why."""
if not torch.cuda.is_available():
    NOTHING_HERE |= dict.fromkeys((metrics.MEMORY.shown, "ray_node_gram_used"), "there is no GPU")

CONFIG = """\
global: {{scrape_interval: 5s, scrape_timeout: 5s}}
scrape_configs: [{{job_name: omni_ray, static_configs: [{{targets: ["{target}"]}}]}}]
"""


def binary(name: str) -> str:
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.prefix) / "prometheus/usr/bin")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"there is no {name}: run scripts/servers, or sudo apt install prometheus")
    return found


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The HTTP API of a Prometheus that scrapes the server."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(CONFIG.format(target=server.url.removeprefix("http://")))
    address = f"127.0.0.1:{free_port()}"
    command = [
        binary("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("w") as log, httpx.Client(base_url=f"http://{address}", timeout=30) as client:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_ready(client):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            yield client
        finally:
            process.terminate()
            process.wait(30)


def is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/-/ready").status_code == 200
    return False


def expressions() -> set[str]:
    """Those of the panels, with the dashboard's variables set: every model, two minutes."""
    panels = json.loads(FILE.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return {each.replace("$__rate_interval", "2m").replace("$model", ".*") for each in found}


def has_data(client: httpx.Client, expression: str) -> bool:
    """Whether the query gives a number; a query that Prometheus refuses fails the test."""
    reply = client.get("/api/v1/query", params={"query": expression}).json()
    assert reply["status"] == "success", f"{expression}: {reply.get('error')}"
    return any(not math.isnan(float(series["value"][1])) for series in reply["data"]["result"])


def use(server: Server) -> None:
    """One request to each model, and one to none."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        image = {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 4}
        assert client.post("/v1/images/generations", json=image).status_code == 200
        for model in ("demo-chat", "demo-omni"):
            chat = {"model": model, "messages": [{"role": "user", "content": "a red circle, please"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        assert client.post("/v1/chat/completions", json={"model": "nobody", "messages": []}).status_code == 404


def test_every_query_of_the_dashboard_has_data(server: Server, prometheus: httpx.Client) -> None:
    excused = {each for each in expressions() if any(name in each for name in NOTHING_HERE)}
    missing = expressions() - excused
    deadline = time.monotonic() + DEADLINE_S
    while missing and time.monotonic() < deadline:
        use(server)
        time.sleep(2)
        missing = {each for each in missing if not has_data(prometheus, each)}
    target = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"][0]
    assert not missing, "no data:\n" + "\n".join([*sorted(missing), target["lastError"]])
    assert target["health"] == "up", target["lastError"]
    for each in excused:
        has_data(prometheus, each)  # it has to be a query all the same


def test_requests_are_told_by_model_and_outcome(server: Server, prometheus: httpx.Client) -> None:
    use(server)
    body = {"model": "demo-image", "prompt": "a red circle", "num_inference_steps": 200}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1)
    told = [("demo-image", "2xx"), ("demo-image", "left"), ("demo-chat", "2xx"), ("demo-omni", "2xx"), ("", "4xx")]
    name = metrics.HTTP_REQUESTS.shown
    wanted = {f'{name}{{model="{model}", outcome="{outcome}"}} > 0' for model, outcome in told}
    deadline = time.monotonic() + DEADLINE_S
    while missing := {each for each in wanted if not has_data(prometheus, each)}:
        assert time.monotonic() < deadline, missing
        time.sleep(2)
    assert not has_data(prometheus, f'{name}{{path="/metrics"}}')


def test_our_names_and_units_are_what_prometheus_advises(server: Server) -> None:
    """Of the labels only Ray's own are camelCase."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    names = "|".join(metric.shown for metric in metrics.METRICS)
    ours = "".join(f"{line}\n" for line in page.splitlines() if re.match(rf"(# (HELP|TYPE) )?({names})", line))
    check = [binary("promtool"), "check", "metrics"]
    said = subprocess.run(check, input=ours, capture_output=True, text=True, timeout=60)
    advice = [line for line in (said.stdout + said.stderr).splitlines() if "not 'camelCase'" not in line]
    assert ours
    assert not advice
