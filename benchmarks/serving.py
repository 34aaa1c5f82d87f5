"""Load for any OpenAI-compatible server: chat (streamed or plain) and images, at a fixed number of requests in flight.

    python -m benchmarks.serving --model demo-chat --max-concurrency 1 8 32 --num-prompts 64 [--plain] [--base-url URL]
    python -m benchmarks.serving --model demo-image --dataset images --size 256x256 --num-prompts 4

Prints requests, tokens or images per second, time to first token and end-to-end latency at mean, P50 and P99, and
failures by cause. The clients run in processes of their own, so that reading many streams does not slow the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Outcome:
    """One request: seconds to the first byte of content and to the end, what came, and why it failed."""

    first_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    failure: str | None = None


@dataclass
class Summary:
    outcomes: list[Outcome] = field(default_factory=list)
    wall_s: float = 0.0

    def row(self, label: str) -> dict[str, Any]:
        good = [o for o in self.outcomes if o.failure is None]
        first, total = sorted(o.first_s for o in good) or [0.0], sorted(o.total_s for o in good) or [0.0]
        return {
            "concurrency": label,
            "req/s": len(good) / self.wall_s,
            "tok/s": sum(o.tokens for o in good) / self.wall_s,
            "ttft_mean_ms": 1e3 * statistics.mean(first),
            "ttft_p50_ms": 1e3 * first[len(first) // 2],
            "ttft_p99_ms": 1e3 * first[int(len(first) * 0.99)],
            "e2e_mean_s": statistics.mean(total),
            "e2e_p50_s": total[len(total) // 2],
            "e2e_p99_s": total[int(len(total) * 0.99)],
            "failed": dict(collections.Counter(o.failure for o in self.outcomes if o.failure)),
        }


def body_of(args: argparse.Namespace, index: int) -> tuple[str, dict[str, Any]]:
    """Path and JSON body of request ``index``; prompts differ, so that no prefix cache answers."""
    words = random.Random(index + args.seed)
    if args.dataset == "images":
        extra = {"num_inference_steps": args.steps} if args.steps else {}
        return "/v1/images/generations", {
            "model": args.model,
            "prompt": "a red circle",
            "size": args.size,
            "seed": index,
            **extra,
        }
    prompt = " ".join(
        words.choice(("red", "blue", "circle", "square", "left", "above", "large")) for _ in range(args.input_len)
    )
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": args.output_len,
        "temperature": 0.0,
    }
    return "/v1/chat/completions", body | {"ignore_eos": True, "stream": not args.plain}


async def one(session: aiohttp.ClientSession, args: argparse.Namespace, index: int) -> Outcome:
    path, body = body_of(args, index)
    outcome, start = Outcome(), time.perf_counter()
    try:
        async with session.post(args.base_url + path, json=body) as reply:
            if reply.status != 200:
                outcome.failure = f"HTTP {reply.status}"
                return outcome
            first = b""
            async for piece in reply.content.iter_any():
                if not first and (body.get("stream") is not True or b'"content":"' in piece):
                    first, outcome.first_s = piece, time.perf_counter() - start
            outcome.tokens = args.output_len if args.dataset == "chat" else 0
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.failure = type(error).__name__
    outcome.total_s = time.perf_counter() - start
    return outcome


async def client(args: argparse.Namespace, indexes: list[int], concurrency: int) -> list[Outcome]:
    """Keep ``concurrency`` of the requests in flight until all are done."""
    waiting = collections.deque(indexes)
    outcomes: list[Outcome] = []
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def worker() -> None:
            while waiting:
                outcomes.append(await one(session, args, waiting.popleft()))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return outcomes


def run_client(args: argparse.Namespace, indexes: list[int], concurrency: int) -> list[Outcome]:
    return asyncio.run(client(args, indexes, concurrency))


def measure(args: argparse.Namespace, concurrency: int, pool: concurrent.futures.ProcessPoolExecutor) -> Summary:
    """Spread the requests over the client processes and collect their outcomes."""
    num_clients = min(args.clients, concurrency)
    num_prompts = max(args.num_prompts, 4 * concurrency)
    shares = [list(range(i, num_prompts, num_clients)) for i in range(num_clients)]
    places = [concurrency // num_clients + (i < concurrency % num_clients) for i in range(num_clients)]
    start = time.perf_counter()
    parts = [pool.submit(run_client, args, share, n) for share, n in zip(shares, places, strict=True)]
    outcomes = [outcome for part in parts for outcome in part.result()]
    return Summary(outcomes, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", choices=("chat", "images"), default="chat")
    parser.add_argument("--num-prompts", type=int, default=64, help="at least four times the concurrency")
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--plain", action="store_true", help="no streaming")
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=0, help="denoise steps; 0 leaves them to the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--json", help="append the rows to this file")
    args = parser.parse_args()

    with concurrent.futures.ProcessPoolExecutor(args.clients) as pool:
        run_client(args, [10**6, 10**6 + 1], 1)  # warm-up
        for concurrency in args.max_concurrency:
            row = measure(args, concurrency, pool).row(str(concurrency))
            cells = (
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"{args.model} {'plain' if args.plain else 'stream'}: " + "  ".join(cells), flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(
                        json.dumps({"model": args.model, "url": args.base_url, "plain": args.plain, **row}) + "\n"
                    )


if __name__ == "__main__":
    main()
