"""Images of a gang beside those of one rank, on one machine: PSNR and seconds per image.

    python -m benchmarks.gang SOURCE [--dummy] [--layers 4] [--compile] [--parallel '{"ulysses": 2}' '{"cfg": 2}' ...]

The ranks are processes that share the machine's GPUs (where two share one they talk over gloo; seconds mean something
only where each has its own). --layers cuts the depth of the transformer and of the text encoders, so that many copies
fit on one card. Three requests with guidance run side by side, one per forward, twice: the second time is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from omni_ray.accel.apply import accelerate
from omni_ray.accel.parallel import build_mesh
from omni_ray.config.spec import Batching, Compile, DitGroup, DitParallel
from omni_ray.engine import world
from omni_ray.engine.exchange import Exchange
from omni_ray.engine.lockstep import Lockstep
from omni_ray.engine.loop import EngineLoop
from omni_ray.messages import Job
from omni_ray.tuning.likeness import psnr
from omni_ray.tuning.run import device_and_dtype, load, run

AXES = [{"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"cfg": 2}, {"ulysses": 4}, {"tensor": 2, "ulysses": 2}]
AXES += [{"cfg": 2, "ulysses": 2}]
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers", "depth")
RUNS = 2  # the first one compiles
PROMPTS = ["a red circle on a hill", "two boats", "a city of glass by the sea, at night"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--layers", type=int, help="blocks of each kind that the modules keep")
    parser.add_argument("--parallel", type=json.loads, nargs="+", default=AXES)
    parser.add_argument("--compile", action="store_true", help="both sides")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank(args, *args.rank)
        return
    print(f"{args.source}, {args.layers or 'all'} layers, {args.size}, {args.steps} steps")
    print(f"{'axes':>24} {'PSNR dB':>8} {'one rank s':>11} {'gang s':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.layers is not None:
            args.source = str(shallow(Path(args.source), Path(folder), args.layers))
        for size in sorted({DitParallel(**axes).num_ranks for axes in args.parallel}):
            start(args, size)


def shallow(source: Path, folder: Path, num_layers: int) -> Path:
    """A copy of a checkpoint folder without weights whose modules have ``num_layers`` blocks of each kind."""
    copy = folder / "shallow"
    shutil.copytree(source, copy)
    for file in copy.glob("*/config.json"):
        config = json.loads(file.read_text())
        if file.parent.name.startswith("transformer"):  # whose depth may be its class's default
            config["num_layers"] = num_layers
            if config["_class_name"].startswith("Flux"):
                config["num_single_layers"] = num_layers
        cut(config, num_layers)
        file.write_text(json.dumps(config))
    return copy


def cut(config: dict[str, Any], num_layers: int) -> None:
    for key, value in config.items():
        if key in DEPTHS and isinstance(value, int):
            config[key] = min(value, num_layers)
        elif key == "layer_types":
            config[key] = value[:num_layers]
        elif isinstance(value, dict):
            cut(value, num_layers)


def start(args: argparse.Namespace, size: int) -> None:
    """Run those entries of --parallel that have ``size`` ranks, in as many processes."""
    store, port = world.open_store("127.0.0.1")
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "benchmarks.gang",
        args.source,
        "--size",
        str(args.size),
        "--steps",
    ]
    command += [str(args.steps), *(f"--{flag}" for flag in ("dummy", "compile") if getattr(args, flag))]
    command += ["--parallel", *map(json.dumps, args.parallel)]
    ranks = [subprocess.Popen([*command, "--rank", json.dumps([i, size, port])], env=_env(i)) for i in range(size)]
    try:
        if any(codes := [each.wait() for each in ranks]):
            sys.exit(f"the ranks ended with {codes}")
    finally:
        for each in ranks:
            each.kill()
    del store


def _env(index: int) -> dict[str, str]:
    """A rank sees its GPU alone, as it does in a replica."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}


def rank(args: argparse.Namespace, index: int, size: int, port: int) -> None:
    device, _ = device_and_dtype()
    world.join(index, size, "127.0.0.1", port, device, None)
    alone = group_of(args, {})
    alone_s, wanted = together(args, alone, device, None) if index == 0 else (0.0, [])
    for axes in args.parallel:
        group = group_of(args, axes)
        if group.parallel.num_ranks != size:
            continue
        gc.collect()  # what the loop before held
        torch.cuda.empty_cache()
        gang_s, made = together(args, group, device, build_mesh(group.parallel, device.type), leads=index == 0)
        if index == 0:
            label = " x ".join(f"{axis} {degree}" for axis, degree in axes.items())
            print(f"{label:>24} {psnr(wanted, made):>8.1f} {alone_s:>11.2f} {gang_s:>8.2f}", flush=True)


def together(
    args: argparse.Namespace, group: DitGroup, device: torch.device, mesh: DeviceMesh | None, *, leads: bool = True
) -> tuple[float, list[Any]]:
    """Seconds per image and the images, on the rank that leads, of a gang or of one rank without a mesh."""
    pipe = load(group)
    lockstep = Lockstep() if mesh else None
    exchange = Exchange(mesh) if mesh and group.parallel.cfg > 1 else None
    accelerators = accelerate(pipe, group, device, mesh)
    if leads:
        return draw(args, pipe, lockstep=lockstep, exchange=exchange, accelerators=accelerators)
    for _ in range(RUNS):
        loop = EngineLoop(pipe, group.batching, lockstep, exchange, accelerators)
        loop.start()
        loop.join()
    return 0.0, []


def group_of(args: argparse.Namespace, axes: dict[str, int]) -> DitGroup:
    return DitGroup(
        type="dit",
        name="bench",
        source=args.source,
        load_format="dummy" if args.dummy else "auto",
        parallel=DitParallel.model_validate(axes),
        batching=Batching(max_num_batched_tokens=1),
        compile=Compile(mode="regional" if args.compile else "none"),
    )


def draw(args: argparse.Namespace, pipe: Any, **loop_options: Any) -> tuple[float, list[Any]]:
    """Seconds per image and the images."""
    shape = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    guided = {"negative_prompt": "blurred", "true_cfg_scale": 4.0}
    jobs = [
        Job(id=str(seed), model="bench", group="bench", params={"prompt": prompt, **shape, **guided}, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]
    seconds, images = 0.0, list[Any]()
    for _ in range(RUNS):
        seconds, images, _ = run(pipe, jobs, Batching(max_num_batched_tokens=1), **loop_options)
    return seconds / len(jobs), images


if __name__ == "__main__":
    main()
