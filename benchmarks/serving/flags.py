"""The command line, and the workload that it asks for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.arrivals import arrival_times
from benchmarks.serving.request import KINDS, Kind, Request
from benchmarks.serving.trace import read_trace
from benchmarks.serving.workload import Shapes, image_mix, make_requests

DATASETS = (*KINDS, "mixed", "trace")
NUM_PROMPTS = 64


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _server_flags(made.add_argument_group("server"))
    _load_flags(made.add_argument_group("load"))
    _shape_flags(made.add_argument_group("requests"))
    _output_flags(made.add_argument_group("output"))
    return made


def _server_flags(group: Any) -> None:
    group.add_argument("--base-url", help="such as http://127.0.0.1:8000; instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--api-key", help="sent as bearer token")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take")
    group.add_argument(
        "--model", nargs="+", default=[], metavar="[KIND=]NAME", help="mixed takes one a kind: chat=NAME images=NAME"
    )


def _load_flags(group: Any) -> None:
    group.add_argument("--dataset", choices=DATASETS, default="chat")
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="the trace that --dataset trace sends again")
    group.add_argument(
        "--mix", nargs="+", default=[], metavar="KIND=WEIGHT", help="shares of the kinds of mixed; equal if not given"
    )
    group.add_argument("--num-prompts", type=int, help=f"requests; {NUM_PROMPTS}, or the whole trace")
    group.add_argument("--request-rate", type=float, default=math.inf, help="requests a second; inf sends a burst")
    group.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, less comes in clumps")
    group.add_argument(
        "--max-concurrency", type=int, nargs="+", metavar="N", help="requests in flight; several make one run each"
    )
    group.add_argument("--retries", type=int, default=0, help="times that a 429 is sent again, after its Retry-After")
    group.add_argument("--warmup", type=int, default=1, help="requests of each class before the run; 0 means no SLO")
    group.add_argument("--slo-scale", type=float, default=3.0, help="deadline / latency alone, as the warm-up took")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--clients", type=int, default=4, help="client processes")


def _shape_flags(group: Any) -> None:
    group.add_argument("--input-len", "--random-input-len", type=int, default=64, help="words of a prompt")
    group.add_argument("--output-len", "--random-output-len", type=int, default=128, help="tokens of an answer")
    group.add_argument("--plain", action="store_true", help="chat without streaming")
    group.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="for vLLM alone")
    group.add_argument("--size", nargs="+", default=[], metavar="WxH", help="of images; 512² to 1536² if not given")
    group.add_argument("--steps", type=int, nargs="+", default=[], help="of images: one number, or one for each size")
    group.add_argument("--progress", action="store_true", help="images stream their progress; compares its estimates")
    group.add_argument("--video-size", metavar="WxH")
    group.add_argument("--video-steps", type=int)
    group.add_argument("--num-frames", type=int)
    group.add_argument("--seconds", type=int)
    group.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="put into every body")


def _output_flags(group: Any) -> None:
    group.add_argument("--json", type=Path, metavar="FILE", help="append a row for each run")
    group.add_argument("--plot", type=Path, metavar="FILE", help="PNG; of several runs FILE-N.png")
    group.add_argument("--save-trace", type=Path, metavar="FILE", help="write the requests as a trace")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def workload(args: argparse.Namespace) -> list[Request]:
    """The requests with their arrivals; ValueError saying which flag to change."""
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num-prompts {args.num_prompts} has to be at least 1")
    if args.dataset != "videos" and args.size and not all(_is_size(size) for size in args.size):
        raise ValueError(f"--size {' '.join(args.size)} has to be WxH, such as 1024x1024")
    if args.dataset == "trace":
        requests = _replay(args)
    else:
        models, num = _models(args), args.num_prompts or NUM_PROMPTS
        requests = make_requests(num, _weights(args, models), models, _shapes(args), args.seed)
        times = arrival_times(num, args.request_rate, args.burstiness, args.seed)
        requests = [dataclasses.replace(r, at_s=at_s) for r, at_s in zip(requests, times, strict=True)]
    return [dataclasses.replace(r, body=r.body | args.extra_body) for r in requests]


def _replay(args: argparse.Namespace) -> list[Request]:
    if args.dataset_path is None:
        raise ValueError("--dataset trace needs --dataset-path FILE")
    if not math.isinf(args.request_rate):
        raise ValueError("--request-rate: a trace has its own arrivals; leave the flag out")
    requests = read_trace(args.dataset_path)[: args.num_prompts]
    models = _pairs("--model", args.model) if any("=" in name for name in args.model) else {}
    if not models and args.model:
        models = dict.fromkeys(KINDS, args.model[0])
    return [
        dataclasses.replace(r, body=r.body | ({"model": models[r.kind]} if r.kind in models else {})) for r in requests
    ]


def _models(args: argparse.Namespace) -> dict[Kind, str]:
    if args.dataset == "mixed":
        if not args.model:
            raise ValueError("--model: mixed needs one for each kind, such as chat=demo-chat images=demo-image")
        return _pairs("--model", args.model)
    if len(args.model) != 1:
        raise ValueError(f"--model: {args.dataset} needs one model, here came {len(args.model)}")
    return {args.dataset: args.model[0]}


def _weights(args: argparse.Namespace, models: dict[Kind, str]) -> dict[Kind, float]:
    weights = {kind: float(weight) for kind, weight in _pairs("--mix", args.mix).items()}
    if args.mix and set(weights) != set(models):
        raise ValueError(f"--mix names {', '.join(weights)}, but --model has {', '.join(models)}")
    return weights or dict.fromkeys(models, 1.0)


def _pairs(flag: str, pairs: Sequence[str]) -> dict[Kind, str]:
    found: dict[Kind, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None or not equals or not value:
            raise ValueError(f"{flag} {pair!r} has to be KIND=..., where KIND is one of {', '.join(KINDS)}")
        found[kind] = value
    return found


def _is_size(size: str) -> bool:
    return len(parts := size.split("x")) == 2 and all(part.isdigit() and int(part) > 0 for part in parts)


def _shapes(args: argparse.Namespace) -> Shapes:
    if args.dataset == "videos" and (args.size or args.steps):
        raise ValueError("--size and --steps are of images; take --video-size and --video-steps")
    video = {
        "size": args.video_size,
        "num_inference_steps": args.video_steps,
        "num_frames": args.num_frames,
        "seconds": args.seconds,
    }
    return Shapes(
        input_len=args.input_len,
        output_len=args.output_len,
        stream=not args.plain,
        ignore_eos=args.ignore_eos,
        images=image_mix(args.size, args.steps),
        progress=args.progress,
        video={name: value for name, value in video.items() if value is not None},
    )
