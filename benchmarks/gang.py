"""Images of a gang beside those of one rank, on one machine: PSNR and seconds per image.

    python -m benchmarks.gang SOURCE [--dummy] [--layers 4] [--compile] [--parallel '{"ulysses": 2}' '{"cfg": 2}' ...]

The ranks are processes that share the machine's GPUs (where two share one they talk over gloo; seconds mean something
only where each has its own). --layers cuts the depth of the transformer and of the text encoders, so that many copies
fit on one card. Three requests with guidance run side by side, one per forward, twice: the second time is told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from omni_ray.config.spec import Batching, Compile, DitGroup
from omni_ray.messages import Job
from omni_ray.tuning.likeness import psnr
from omni_ray.tuning.measure import measure

AXES = [{"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"cfg": 2}, {"ulysses": 4}, {"tensor": 2, "ulysses": 2}]
AXES += [{"cfg": 2, "ulysses": 2}]
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers", "depth")
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
    args = parser.parse_args()
    print(f"{args.source}, {args.layers or 'all'} layers, {args.size}, {args.steps} steps")
    print(f"{'axes':>24} {'PSNR dB':>8} {'one rank s':>11} {'gang s':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.layers is not None:
            args.source = str(shallow(Path(args.source), Path(folder), args.layers))
        group, jobs = group_of(args), jobs_of(args)
        alone = measure(group, {}, jobs)
        for axes in args.parallel:
            label = " x ".join(f"{axis} {degree}" for axis, degree in axes.items())
            made = measure(group, {"parallel": axes}, jobs)
            seconds = f"{alone.seconds / len(jobs):>11.2f} {made.seconds / len(jobs):>8.2f}"
            print(f"{label:>24} {psnr(alone.images, made.images):>8.1f} {seconds}", flush=True)


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


def group_of(args: argparse.Namespace) -> DitGroup:
    return DitGroup(
        type="dit",
        name="bench",
        source=args.source,
        load_format="dummy" if args.dummy else "auto",
        batching=Batching(max_num_batched_tokens=1),
        compile=Compile(mode="regional" if args.compile else "none"),
    )


def jobs_of(args: argparse.Namespace) -> list[Job]:
    shape = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    guided = {"negative_prompt": "blurred", "true_cfg_scale": 4.0}
    return [
        Job(id=str(seed), model="bench", group="bench", params={"prompt": prompt, **shape, **guided}, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]


if __name__ == "__main__":
    main()
