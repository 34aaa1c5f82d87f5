"""Images of a gang beside those of one rank, through the whole endpoint: PSNR and seconds per image.

    python -m benchmarks.gang SOURCE [--dummy] [--layers 4] [--parallel '{"ulysses": 2}' '{"tensor": 2, "cfg": 2}' ...]

One server with a group of one rank, and a gang for each entry of --parallel. They share the machine's GPUs by
fractions, so this runs on one GPU (there the ranks talk over gloo); seconds mean something only where each rank has a
GPU of its own. --layers cuts the depth of the transformer and of the text encoders, so that many copies fit on a card.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from PIL import Image

from tests.conftest import Server, serving

DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers", "depth")
PROMPTS = ["a red circle on a hill", "two boats", "a city of glass by the sea, at night"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--layers", type=int, help="blocks of each kind that the transformer keeps")
    parser.add_argument("--parallel", type=json.loads, nargs="+", default=[{"ulysses": 2}, {"tensor": 2}, {"cfg": 2}])
    parser.add_argument("--num-gpus", type=float, default=0.2, help="of each rank: its part of a GPU's memory")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source if args.layers is None else str(shallow(Path(args.source), Path(folder), args.layers))
        print(f"{args.source}, {args.layers or 'all'} layers, {args.size}, {args.steps} steps")
        compare(args, source, Path(folder))


def shallow(source: Path, folder: Path, num_layers: int) -> Path:
    """A copy of a checkpoint folder without weights whose modules have ``num_layers`` blocks of each kind."""
    copy = folder / "shallow"
    shutil.copytree(source, copy)
    for file in copy.glob("*/config.json"):
        cut(config := json.loads(file.read_text()), num_layers)
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


def compare(args: argparse.Namespace, source: str, folder: Path) -> None:
    shared: dict[str, Any] = {
        "type": "dit",
        "source": source,
        "load_format": "dummy" if args.dummy else "auto",
        "num_cpus": 0.1,
        "memory": {"gpu_memory_utilization": args.num_gpus},
        "batching": {"max_num_batched_tokens": 1},
    }
    if torch.cuda.is_available():
        shared["num_gpus"] = args.num_gpus
    gangs = {"-".join(f"{axis}{size}" for axis, size in axes.items()): axes for axes in args.parallel}
    models = [{"name": "one", **shared}]
    models += [{"name": name, "parallel": axes, **shared} for name, axes in gangs.items()]
    application = {"name": "omni", "route_prefix": "/", "import_path": "omni_ray.app:build", "args": {"models": models}}
    (folder / "gang.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    print(f"{'axes':>24} {'PSNR dB':>8} {'one rank s':>11} {'gang s':>8}")
    with serving(folder / "gang.yaml", folder / "log") as server:
        alone, alone_s = draw(server, "one", args)
        for name, axes in gangs.items():
            spread, spread_s = draw(server, name, args)
            error = float(np.mean((alone.astype(float) - spread.astype(float)) ** 2))
            psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
            label = " x ".join(f"{axis} {size}" for axis, size in axes.items())
            print(f"{label:>24} {psnr:>8.1f} {alone_s:>11.2f} {spread_s:>8.2f}", flush=True)


def draw(server: Server, model: str, args: argparse.Namespace) -> tuple[Any, float]:
    """The prompts' images, (images, height, width, 3), and the mean seconds of those after the first."""
    images, start = [], 0.0
    for seed, prompt in enumerate(["warm-up", *PROMPTS]):
        if seed == 1:
            start = time.perf_counter()
        body = {"model": model, "prompt": prompt, "size": args.size, "num_inference_steps": args.steps, "seed": seed}
        if "cfg" in json.dumps(args.parallel):
            body |= {"negative_prompt": "blurred", "true_cfg_scale": 4.0}
        reply = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)
        reply.raise_for_status()
        images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))))
    return np.stack(images[1:]), (time.perf_counter() - start) / len(PROMPTS)


if __name__ == "__main__":
    main()
