"""One real server, `deployments/omni.yaml` on Ray Serve, vLLM and diffusers, that all tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
START_S = 300


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the process that started it."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return when every group is ready; the log's end is the message of the failure."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=10).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        pytest.fail(f"the server is not ready after {timeout_s} s:\n{self.log.read_text()[-6000:]}")

    def find(self, title: str, num: int = 1) -> list[psutil.Process]:
        """The ``num`` processes of this server whose titles begin with ``title``, such as ``ray::Rank``."""
        deadline = time.monotonic() + 10
        while True:
            everything = psutil.Process(self.process.pid).children(recursive=True)
            found = [process for process in everything if _title(process).startswith(title)]
            if len(found) == num:
                return found
            assert time.monotonic() < deadline, (title, found)
            time.sleep(0.2)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def num_placement_groups() -> int:
    """Placement groups of the running cluster that hold or want resources."""
    script = (
        "import ray; from ray.util import placement_group_table as table; "
        "ray.init(address='auto', log_to_driver=False); "
        "print(sum(group['state'] != 'REMOVED' for group in table().values()))"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return int(ran.stdout.split()[-1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts servers or engines of its own comes before the shared server, which stays up to the end."""
    items.sort(key=lambda item: "server" in getattr(item, "fixturenames", ()))


@contextlib.contextmanager
def serving(file: Path, log: Path) -> Iterator[Server]:
    """`omni-ray serve FILE` on a free port, ready."""
    port = free_port()
    command = [sys.executable, "-m", "omni_ray.cli", "serve", str(file), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            cwd=ROOT,
        )
    running = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        running.wait_ready()
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`omni-ray serve deployments/omni.yaml`, with a store of jobs of its own."""
    folder = tmp_path_factory.mktemp("server")
    config = yaml.safe_load((ROOT / "deployments/omni.yaml").read_text())
    config["applications"][0]["args"]["jobs"] = {"folder": str(folder / "jobs")}
    (folder / "omni.yaml").write_text(yaml.safe_dump(config))
    with serving(folder / "omni.yaml", folder / "log") as running:
        yield running
