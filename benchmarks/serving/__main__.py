"""Load on any OpenAI-compatible server: chat, images, videos, mixed traffic, or a trace.

    python -m benchmarks.serving --model demo-chat --num-prompts 64 --request-rate 8
    python -m benchmarks.serving --model demo-image --dataset images --size 256x256 --steps 20 --max-concurrency 1 8
    python -m benchmarks.serving --model chat=demo-chat images=demo-image --dataset mixed --size 256x256 --plot load.png

Prints rates, latencies at mean, P50, P95 and P99, the share of requests within their deadline and failures by cause.
Latencies count from the moment of sending. benchmarks/README.md explains each figure, trace.py the format of a trace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import aiohttp

from benchmarks.serving.client import Target
from benchmarks.serving.flags import parser, workload
from benchmarks.serving.limits import find_problems
from benchmarks.serving.load import Load, run
from benchmarks.serving.report import summarise, table
from benchmarks.serving.request import Request
from benchmarks.serving.slo import WarmUpFailed, deadlines, measure_alone
from benchmarks.serving.trace import write_trace


def main() -> None:
    args = parser(__doc__).parse_args()
    url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/").removesuffix("/v1")
    target = Target(url, {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}, args.timeout)
    try:
        requests = workload(args)
        if args.save_trace:
            write_trace(requests, args.save_trace)
        asyncio.run(check_limits(requests, target))
        alone_s = asyncio.run(measure_alone(requests, target, args.warmup)) if args.warmup else {}
    except (OSError, aiohttp.ClientError, ValueError, WarmUpFailed) as error:
        sys.exit(f"benchmarks.serving: {error}")
    rows = []
    for number, limit in enumerate(args.max_concurrency or [None]):
        args.seed += number > 0  # other prompts, or the server has them in its cache
        rows.append(_run_once(args, workload(args) if number else requests, target, alone_s, limit))
    if not all(row["completed"] for row in rows):
        sys.exit("benchmarks.serving: no request succeeded")


async def check_limits(requests: Sequence[Request], target: Target) -> None:
    """Compare with `/v1/models`. A server without it is not asked further.

    Raises:
        OSError, aiohttp.ClientError: no server answers.
        ValueError: its models cannot do what the requests ask for.
    """
    session = aiohttp.ClientSession(target.base_url, headers=target.headers)
    async with session, session.get("/v1/models") as reply:
        if reply.status == 404:
            print("the server has no /v1/models, so that nothing is checked beforehand", file=sys.stderr)
            return
        if reply.status != 200:
            raise ValueError(f"{target.base_url}/v1/models answers {reply.status}: {(await reply.text())[:300]}")
        served = (await reply.json())["data"]
    if problems := find_problems(requests, served):
        raise ValueError("\n  ".join(["the server cannot do this:", *problems]))


def _run_once(
    args: argparse.Namespace, requests: Sequence[Request], target: Target, alone_s: dict[str, float], limit: int | None
) -> dict[str, Any]:
    ran = run(requests, Load(target, limit, args.retries, args.clients), not args.disable_tqdm)
    deadline_s = deadlines(alone_s, args.slo_scale)
    row = summarise(ran, deadline_s, limit, alone_s)
    print(table(row), flush=True)
    if args.json:
        head = {"model": " ".join(args.model), "url": target.base_url, "dataset": args.dataset, "plain": args.plain}
        head |= {
            "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
            "slo_scale": args.slo_scale,
        }
        with args.json.open("a") as file:
            file.write(json.dumps(head | row) + "\n")
    if args.plot:
        from benchmarks.serving.plots import plot_run  # matplotlib takes a second to import

        several = len(args.max_concurrency or ()) > 1
        plot_run(ran, deadline_s, args.plot.with_stem(f"{args.plot.stem}-{limit}") if several else args.plot)
    return row


if __name__ == "__main__":
    main()
