"""One CPU rank of a gang, without Ray: ``python -m tests.ranks INDEX SIZE PORT CASES RESULTS``.

For each case (family, blocks of a group) the ranks run seven requests of mixed sizes and step counts side by side; one
is cancelled midway, one fails in the decoder. The first rank writes how far each image is from the one that a single
rank makes.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from omni_ray.accel.apply import accelerate
from omni_ray.accel.parallel import build_mesh
from omni_ray.accel.parallel.mesh import group_of
from omni_ray.config.spec import Batching, DitGroup, DitOffload, DitParallel
from omni_ray.engine import lane, world
from omni_ray.engine.exchange import Exchange
from omni_ray.engine.lockstep import Lockstep
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import Cancelled
from omni_ray.messages import Failure, Job, StepEvent, Usage
from tests.tiny_dit import build

MIXED = [("a red circle", 64, 64, 4), ("a blue house by the sea", 64, 96, 6), ("a tree", 96, 64, 3)]
FAILING = (96, 96)
CPU = torch.device("cpu")

_solo: list[dist.ProcessGroup] = []
"""Of a rank of several: its group of one."""

_wanted: dict[str, dict[str, Any]] = {}
"""The one-rank images of a group's cases before."""
MIXED += [("two yellow birds", 64, 64, 5), ("a ship", 64, 96, 4)]


def jobs_of(family: str) -> list[Job]:
    """Five requests that end, one that cannot be decoded, and one that would take long."""
    own: dict[str, Any] = {"output_type": "np"}
    own |= {"num_frames": 5} if family.startswith("wan") else {}
    own |= {"num_frames": 5, "num_latent_frames_per_chunk": 2} if family == "helios" else {}
    own |= {"negative_prompt": "dull"} if family in ("qwen_image", "hunyuan_image", "wan", "sd3", "z_image") else {}
    own |= {"true_cfg_scale": 2.0} if family == "qwen_image" else {}
    requests = [*MIXED, ("too large", *FAILING, 2), ("never done", 64, 64, 150)]
    return [
        Job(
            id=f"{family}-{i}",
            model="m",
            group="m",
            params={"prompt": prompt, "height": height, "width": width, "num_inference_steps": steps, **own},
            seed=i,
        )
        for i, (prompt, height, width, steps) in enumerate(requests)
    ]


def pixels(output: Any) -> Any:
    return np.asarray(output.images if hasattr(output, "images") else output.frames, dtype=np.float64)


def run_case(family: str, levers: dict[str, Any], folder: Path, leads: bool) -> dict[str, Any]:
    """``levers`` are the blocks of a group. The one-rank images are made with its cache and quantization, but all
    weights on the device; where it has neither, by the plain pipeline."""
    group = DitGroup(type="dit", name="m", source=str(folder), device="cpu", **levers)
    jobs, made = jobs_of(family), dict[str, Any]()
    if family == "flux":
        jobs[1] = dataclasses.replace(jobs[1], num_previews=2)
    lane.encode_outputs = lambda output, job: iter(made.update({job.id: pixels(output)}) or ())  # type: ignore[assignment]
    alone = group.model_copy(update={"parallel": DitParallel(), "offload": DitOffload()})
    if leads and repr(alone) not in _wanted:
        _alone(load(folder), alone, jobs, made)
        _wanted[repr(alone)] = dict(made)
        made.clear()
    wanted = _wanted.get(repr(alone), {})
    pipe, size = load(folder), group.parallel.num_ranks
    mesh = build_mesh(group.parallel, "cpu") if size > 1 else None
    exchange = Exchange(mesh) if mesh is not None and group.parallel.cfg > 1 else None
    accelerators = accelerate(pipe, group, CPU, mesh)
    _fail_to_decode(pipe.vae)
    lockstep = Lockstep() if size > 1 else None
    loop = EngineLoop(pipe, Batching(max_num_seqs=7), lockstep, exchange, accelerators, CPU)
    loop.start()
    if not leads:
        loop.join()
        return {}
    ended = {job.id: _follow(loop, job, cancel_after=2 if job is jobs[-1] else None) for job in jobs}
    last = {job_id: events.get(timeout=120) for job_id, events in ended.items()}
    loop.stop()
    failed = [str(e.error) for e in last.values() if isinstance(e, Failure) and not isinstance(e.error, Cancelled)]
    cancelled = [i for i, e in last.items() if isinstance(e, Failure) and isinstance(e.error, Cancelled)]
    error = max((float(np.abs(made[i] - wanted[i]).max()) for i in wanted if i in made), default=None)
    warnings = {warning for e in last.values() if isinstance(e, Usage) for warning in e.warnings}
    assert all("the threshold was never reached" in each for each in warnings), warnings  # as these tests want it
    skipped = sum(e.steps_skipped for e in last.values() if isinstance(e, Usage))
    return {"error": error, "failed": failed, "cancelled": cancelled, "num_made": len(made), "skipped": skipped}


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _alone(pipe: DiffusionPipeline, group: DitGroup, jobs: list[Job], made: dict[str, Any]) -> None:
    """The images of those jobs that end, on one rank, one after the other."""
    accelerators = accelerate(pipe, group, CPU)
    if accelerators.cache_dit and _solo:
        accelerators.cache_dit.compare_within(_solo[0])
    if group.cache.kind == "none":
        for job in jobs[:5]:
            made[job.id] = pixels(pipe(**job.params, generator=torch.Generator("cpu").manual_seed(job.seed or 0)))
        return
    loop = EngineLoop(pipe, Batching(), accelerators=accelerators)
    loop.start()
    for job in jobs[:5]:
        assert isinstance(_follow(loop, job, None).get(timeout=120), Usage)
    loop.stop()


def _fail_to_decode(vae: Any) -> None:
    """Makes the decoder refuse latents of the size FAILING."""
    decode = vae.decode

    def picky(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tuple(latents.shape[-2:]) == tuple(edge // 8 for edge in FAILING):
            raise ValueError("no such size")
        return decode(latents, *args, **kwargs)

    vae.decode = picky


def _follow(loop: EngineLoop, job: Job, cancel_after: int | None) -> queue.SimpleQueue[Any]:
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def emit(event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == cancel_after:
            loop.cancel(job.id)
        if isinstance(event, (Usage, Failure)):
            ended.put(event)

    loop.submit(job, emit)
    return ended


def run_ranks(size: int, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run the cases on ``size`` ranks and return the first rank's results, in order."""
    with tempfile.TemporaryDirectory() as folder:
        for family in {family for family, _ in cases}:
            build(family, Path(folder, family))
        results = Path(folder, "results.json")
        store, port = world.open_store("127.0.0.1")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", str(i), str(size), str(port), json.dumps(cases), str(results)]
            )
            for i in range(size)
        ]
        try:
            codes = [rank.wait(timeout=400) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        del store
        assert codes == [0] * size, f"the ranks ended with {codes}"
        return list(json.loads(results.read_text()))


def main() -> None:
    index, size, port, cases, results = sys.argv[1:]
    torch.set_num_threads(1)
    if size != "1":
        world.join(int(index), int(size), "127.0.0.1", int(port), CPU, None)
        _solo.append(group_of([[rank] for rank in range(int(size))]))
    rows = [
        run_case(family, levers, Path(results).parent / family, index == "0") for family, levers in json.loads(cases)
    ]
    if index == "0":
        Path(results).write_text(json.dumps(rows))
    if size != "1":  # its threads may not outlast the interpreter
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
