"""The command line, without a cluster: what it prints, where, and how it exits."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from omni_ray import __version__
from omni_ray.cli import main
from omni_ray.cli.announce import announcement
from omni_ray.cli.cluster import Cluster
from omni_ray.cli.environment import environment
from omni_ray.cli.progress import ProgressLines
from omni_ray.cli.ready import phase_of
from omni_ray.config.load import load_file
from omni_ray.errors import without_traceback
from omni_ray.messages import GroupStatus, LoadProgress
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
DEPLOYMENT = str(ROOT / "deployments/omni.yaml")
GIB = 2**30


def run(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def status_of(*progress: LoadProgress, **fields: Any) -> dict[str, Any]:
    states = fields.pop("replicas", {"STARTING": 1})
    ready = states.get("RUNNING", 0) > 0
    return asdict(GroupStatus(group="flux", ready=ready, replicas=states, progress=progress, **fields))


def loading(replica: str, phase: Any, **fields: Any) -> LoadProgress:
    return LoadProgress(group="flux", replica_id=replica, phase=phase, **fields)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"omni-ray {__version__}\n"


def test_check_prints_a_line_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", DEPLOYMENT) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["demo-chat", "ar", "demo:chat", "1", "replica", "x", "1", "rank"],
        ["demo-image", "dit", "demo:image", "1", "replica", "x", "1", "rank"],
        ["demo-video", "dit", "demo:video", "1", "replica", "x", "1", "rank"],
        ["demo-omni", "pipeline", "demo-chat", "->", "demo-image"],
    ]


@pytest.mark.parametrize("verb", ["check", "serve"])
def test_a_broken_file_ends_before_anything_starts(verb: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("aplications: []\n")
    message = run(verb, str(path))
    assert f"{path}:1:1: aplications: unknown key 'aplications'; did you mean 'applications'?" in message.splitlines()


def test_serve_refuses_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("serve", DEPLOYMENT, "--port", str(port)).startswith(f"port {port} of 127.0.0.1 is in use")


HAPROXY = Path(sys.executable).with_name("omni-ray-haproxy")
HAPROXY_CONFIG = """
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    retries 0
    errorfile 503 {folder}/500.http
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend servers if {{ path_beg / }}
backend servers
    server only 127.0.0.1:{server}
"""
HAPROXY_CONFIG_AT_FIRST = """
defaults
    mode http
    timeout client 5s
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
"""


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_variables")
def test_serves_fast_path_is_on_and_notices_clients_that_leave() -> None:
    variables = environment()
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert variables["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(HAPROXY)


@pytest.mark.usefixtures("no_variables")
def test_the_environment_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    names = ("RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
    assert not environment().keys() & names


@pytest.mark.usefixtures("no_variables")
def test_a_shell_takes_the_environment_over() -> None:
    command = 'eval "$("$0" -m omni_ray.cli env)" && printenv RAY_AUTH_MODE RAY_SERVE_HAPROXY_BINARY_PATH'
    told = subprocess.run(["sh", "-c", command, sys.executable], check=True, capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.split() == ["disabled", str(HAPROXY)]


def test_our_haproxy_is_haproxy_even_where_the_variable_names_it() -> None:
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY)}
    told = subprocess.run([HAPROXY, "-v"], env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert told.stdout.startswith("HAProxy version")


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Callable[..., httpx.Response]]:
    """Ours, with one server on a port that is given; returns what a client gets."""
    started = []

    def ask(server: int, config: str = HAPROXY_CONFIG) -> httpx.Response:
        port = free_port()
        (tmp_path / "haproxy.cfg").write_text(config.format(folder=tmp_path, port=port, server=server))
        started.append(subprocess.Popen([HAPROXY, "-db", "-f", tmp_path / "haproxy.cfg"]))
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:
            return client.get(f"http://127.0.0.1:{port}/")

    yield ask
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("knows_of_a_server", [True, False])
def test_our_haproxy_says_that_a_request_may_be_sent_again(
    knows_of_a_server: bool, haproxy: Callable[..., httpx.Response]
) -> None:
    answer = haproxy(free_port(), HAPROXY_CONFIG if knows_of_a_server else HAPROXY_CONFIG_AT_FIRST)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


def test_our_haproxy_asks_a_silent_server_whether_it_is_there(haproxy: Callable[..., httpx.Response]) -> None:
    def keepalives(port: int) -> list[bool]:
        """Of the connections to this port: whether the kernel's timer that they wait for is that of keepalives."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [timer.startswith("02:") for _, _, peer, _, _, timer, *_ in lines if peer.endswith(f":{port:04X}")]

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        port = server.getsockname()[1]
        answer = thread.submit(haproxy, port)
        connection, _ = server.accept()
        connection.recv(1)
        assert any(keepalives(port))
        connection.close()
        assert answer.result().status_code == 502


@pytest.mark.parametrize("status", [404, 500])
@pytest.mark.parametrize(("media_type", "is_ours"), [("text/plain", False), ("application/json", True)])
def test_our_haproxy_tells_serves_failures_from_our_own(
    media_type: str, is_ours: bool, status: int, haproxy: Callable[..., httpx.Response]
) -> None:
    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert haproxy(server.server_port).status_code == (status if is_ours else 503)
        server.shutdown()


def test_the_address_is_one_that_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "open.yaml"
    path.write_text((ROOT / "deployments/omni.yaml").read_text().replace("127.0.0.1", "0.0.0.0").replace("8000", "81"))
    assert Cluster(load_file(path)).url == "http://127.0.0.1:81"


def test_the_announcement_names_address_models_and_a_request() -> None:
    text = announcement("http://127.0.0.1:8000", load_file(DEPLOYMENT).omni_applications)
    assert text.splitlines()[:2] == [
        "ready: http://127.0.0.1:8000",
        "models: demo-chat (ar), demo-image (dit), demo-video (dit), demo-omni (pipeline)",
    ]
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text


@pytest.mark.parametrize(
    ("group", "phase", "detail"),
    [
        (status_of(message="waits for a GPU"), "starting", "waits for a GPU"),
        (
            status_of(loading("a", "loading weights", done_bytes=3 * GIB, total_bytes=12 * GIB)),
            "loading weights",
            "3.00/12.00 GiB",
        ),
        (status_of(loading("a", "compiling")), "compiling", ""),
        (status_of(loading("a", "ready"), replicas={"RUNNING": 1}), "ready", ""),
        (status_of(loading("dead", "failed"), loading("b", "starting")), "starting", ""),
        (
            status_of(loading("a", "ready"), loading("b", "compiling"), replicas={"RUNNING": 1, "STARTING": 1}),
            "compiling",
            "(1 of 2 replicas ready)",
        ),
    ],
)
def test_phase(group: dict[str, Any], phase: str, detail: str) -> None:
    assert phase_of(group) == (phase, detail)


def test_the_reason_of_a_failure_is_the_end_of_its_traceback() -> None:
    trace = 'ray::Rank.load()\n  File "a.py", line 1, in load\n    fail()\n    ^^^^\nConfigError: no weights\nadd them'
    assert without_traceback(trace) == "ConfigError: no weights\nadd them"
    assert without_traceback("a plain\n  message") == "a plain\n  message"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_change_in_place_on_a_terminal() -> None:
    out = Terminal()
    lines = ProgressLines(["chat", "flux"], out)
    lines.draw()
    lines.update("flux", "loading weights", "1.00/2.00 GiB")
    lines.draw()
    first, second = out.getvalue().split("\x1b[2A")
    assert first.count("waiting") == 2
    assert second.splitlines()[1].endswith("flux  loading weights  1.00/2.00 GiB")


def test_elsewhere_each_phase_is_a_line() -> None:
    out = io.StringIO()
    lines = ProgressLines(["chat"], out)
    for phase, detail in [("starting", ""), ("loading weights", "1"), ("loading weights", "2"), ("ready", "")]:
        lines.update("chat", phase, detail)
        lines.draw()
    assert [line.partition(" s  ")[2].split("  ") for line in out.getvalue().splitlines()] == [
        ["chat", "starting"],
        ["chat", "loading weights", "1"],
        ["chat", "ready"],
    ]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers every request with the parameter: a status and a body."""
    code, body = request.param

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


NOT_READY = json.dumps({"ready": False, "groups": [status_of(num_queued=3, outstanding_s=1.25)]})


@pytest.mark.parametrize("address", [(503, NOT_READY)], indirect=True)
def test_status_prints_a_row_per_group(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "--address", address) == 1
    head, row = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "MODEL"
    assert row.split() == ["flux", "starting", "1", "starting", "0", "3", "1.2", "s"]


@pytest.mark.parametrize("address", [(200, "<html>"), (404, "no"), (200, "{}")], indirect=True)
def test_status_of_another_server(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "--address", address) == 1
    assert "no omni_ray answers" in capsys.readouterr().err
