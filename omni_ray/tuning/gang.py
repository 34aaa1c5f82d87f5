"""A setting of several ranks, measured on this machine: processes that meet as those of a replica do.

    python -m omni_ray.tuning.gang FOLDER INDEX PORT    # one rank, started by `measure_gang`

Where two ranks share a GPU they talk over gloo, and their seconds say nothing of a machine where each has its own.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_ray.accel.parallel import build_mesh
from omni_ray.config.spec import DitGroup
from omni_ray.engine import world
from omni_ray.engine.exchange import Exchange
from omni_ray.engine.lockstep import Lockstep
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError, OmniRayError
from omni_ray.messages import Job
from omni_ray.tuning.measured import NUM_RUNS, Measured, measured
from omni_ray.tuning.run import device_and_dtype, in_a_thread, prepare

POLL_S = 0.1
HOST = "127.0.0.1"


def measure_gang(group: DitGroup, jobs: Sequence[Job]) -> Measured:
    """What the first rank measured, of as many processes as the group's replica has ranks.

    Raises ConfigError where a rank cannot do what the group says, or ends before it has.
    """
    store, port = world.open_store(HOST)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((group, list(jobs))))
        ranks = [_start(folder, i, port) for i in range(group.parallel.num_ranks)]
        try:
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                time.sleep(POLL_S)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            del store
        if (failed := next((i for i, code in enumerate(codes) if code), None)) is not None:
            raise ConfigError(_last_words(folder, failed, codes[failed]))
        found: Measured = pickle.loads((folder / "measured").read_bytes())
    return found


def _start(folder: Path, index: int, port: int) -> subprocess.Popen[bytes]:
    """A rank sees its GPU alone, as it does in a replica."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
    command = [sys.executable, "-m", __name__, str(folder), str(index), str(port)]
    with (folder / f"log-{index}").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _last_words(folder: Path, index: int, code: int | None) -> str:
    if (file := folder / f"refused-{index}").is_file():
        return file.read_text()
    lines = (folder / f"log-{index}").read_text(errors="replace").strip().splitlines()
    return f"rank {index} ended with {code}: {lines[-1] if lines else 'it said nothing'}"


def _rank(folder: Path, index: int, port: int) -> None:
    """Load, and run the jobs in step with the other ranks; the first one tells what it measured."""
    group, jobs = pickle.loads((folder / "task").read_bytes())
    device, _ = device_and_dtype()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.parallel.num_ranks))
    world.join(index, group.parallel.num_ranks, HOST, port, device, None)
    lockstep, mesh = Lockstep(), build_mesh(group.parallel, device.type)
    exchange = Exchange(mesh) if group.parallel.cfg > 1 else None
    pipe, accelerators = in_a_thread(prepare, group, mesh)
    options: dict[str, Any] = {"lockstep": lockstep, "exchange": exchange, "accelerators": accelerators}
    if lockstep.leads:
        found = measured(pipe, group.batching, jobs, **options)
        (folder / "measured").write_bytes(pickle.dumps(found))
        return
    for _ in range(NUM_RUNS):
        loop = EngineLoop(pipe, group.batching, device=device, **options)
        loop.start()
        loop.join()


def main() -> None:
    folder, index, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        _rank(folder, index, port)
    except OmniRayError as error:
        (folder / f"refused-{index}").write_text(error.message)
        raise


if __name__ == "__main__":
    main()
