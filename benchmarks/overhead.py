"""What the endpoint costs: the same load on the bare engine and on omni_ray, in one run, as ratios.

python -m benchmarks.overhead ar  SOURCE [--dummy] [--max-concurrency 1 64 256]    # beside `vllm serve`
python -m benchmarks.overhead dit SOURCE [--dummy] [--size 1024x1024] [--steps 28] # beside a plain diffusers script
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import serve_file

PROMPT = "a red circle"
"""The same on both sides: a longer one is more work, and one of another length another shape for the compiler."""

PORTS = {"bare": 8100, "omni_ray": 8101}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", choices=("ar", "dit"))
    parser.add_argument("source")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--max-concurrency", nargs="+", default=["1", "64", "256"])
    parser.add_argument("--output-len", default="128")
    parser.add_argument("--mode", nargs="+", choices=("streamed", "plain"), default=["streamed", "plain"])
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--engine-args", default="{}", help="JSON, given to both sides")
    parser.add_argument("--api-replicas", type=int, default=1)
    args = parser.parse_args()
    (compare_ar if args.type == "ar" else compare_dit)(args)


def compare_ar(args: argparse.Namespace) -> None:
    engine_args = json.loads(args.engine_args)
    flags = [
        f"--{key.replace('_', '-')}={json.dumps(v) if isinstance(v, dict) else v}" for key, v in engine_args.items()
    ]
    bare = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        args.source,
        "--served-model-name=bench",
        f"--port={PORTS['bare']}",
        *flags,
    ]
    if args.dummy:
        bare.append("--load-format=dummy")
    model = {
        "name": "bench",
        "type": "ar",
        "source": args.source,
        "load_format": "dummy" if args.dummy else "auto",
        "engine_args": engine_args,
    }
    rows = {
        side: _load_chat(args, side, command) for side, command in (("omni_ray", _omni(args, model)), ("bare", bare))
    }
    print(
        f"\n{'mode':>7} {'in flight':>9} {'bare req/s':>11} {'omni req/s':>11} {'ratio':>6} "
        f"{'bare TTFT ms':>13} {'omni TTFT ms':>13} {'ratio':>6}  failed"
    )
    for one, two in zip(rows["bare"], rows["omni_ray"], strict=True):
        print(
            f"{'plain' if one['plain'] else 'stream':>7} {one['concurrency']:>9} "
            f"{one['req/s']:>11.2f} {two['req/s']:>11.2f} {two['req/s'] / one['req/s']:>6.3f} "
            f"{one['ttft_p50_ms']:>13.1f} {two['ttft_p50_ms']:>13.1f} {two['ttft_p50_ms'] / one['ttft_p50_ms']:>6.2f}  "
            f"{one['failed']} {two['failed']}"
        )


def _load_chat(args: argparse.Namespace, side: str, command: list[str]) -> list[dict[str, Any]]:
    url, rows = f"http://127.0.0.1:{PORTS[side]}", Path(tempfile.mkstemp(suffix=".jsonl")[1])
    with _Running(command, url + ("/ready" if side == "omni_ray" else "/health")):
        for seed, (mode, concurrency) in enumerate(itertools.product(args.mode, args.max_concurrency)):
            flags = ["--plain"] if mode == "plain" else []
            load = ["--max-concurrency", concurrency, "--num-prompts", str(max(16, 4 * int(concurrency)))]
            _load(url, rows, [*load, "--output-len", args.output_len, "--seed", str(seed), *flags])
    return [json.loads(line) for line in rows.read_text().splitlines()]


def _load(url: str, rows: Path, flags: list[str]) -> None:
    """One run of the load generator, after two requests that warm up; its row goes into ``rows``."""
    fixed = ["--base-url", url, "--model", "bench", "--warmup", "2", "--disable-tqdm", "--json", str(rows)]
    subprocess.run([sys.executable, "-m", "benchmarks.serving", *fixed, *flags], check=True)


def compare_dit(args: argparse.Namespace) -> None:
    before_s = _plain_s(args)
    model = {
        "name": "bench",
        "type": "dit",
        "source": args.source,
        "load_format": "dummy" if args.dummy else "auto",
        "compile": {"mode": "regional" if args.compile else "none"},
        "attention": {"backend": "native"},
    }
    url, rows = f"http://127.0.0.1:{PORTS['omni_ray']}", Path(tempfile.mkstemp(suffix=".jsonl")[1])
    with _Running(_omni(args, model), url + "/ready"):
        load = ["--dataset", "images", "--size", args.size, "--steps", str(args.steps)]
        load += ["--extra-body", json.dumps({"prompt": PROMPT})]
        _load(url, rows, [*load, "--max-concurrency", "1", "--num-prompts", str(args.images), "--clients", "1"])
        account = _one_image(args, url)
    served_s, after_s = json.loads(rows.read_text())["e2e_mean_s"], _plain_s(args)
    print(
        f"\n{args.source} {args.size}, {args.steps} steps: plain diffusers {before_s:.3f} s before and {after_s:.3f} s "
        f"after, through HTTP {served_s:.3f} s, ratio {2 * served_s / (before_s + after_s):.4f}; one request by "
        f"its own account: {account['run_s']:.3f} s, {account['device_s']:.3f} s of them the device's"
    )


def _plain_s(args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.overhead_plain", json.dumps(vars(args) | {"prompt": PROMPT})]
    plain = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(plain.stdout.splitlines()[-1])


def _one_image(args: argparse.Namespace, url: str) -> dict[str, Any]:
    body = {"model": "bench", "prompt": PROMPT, "size": args.size, "num_inference_steps": args.steps}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/images/generations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        account: dict[str, Any] = json.load(reply)["omni"]
        return account


def _omni(args: argparse.Namespace, model: dict[str, Any]) -> list[str]:
    spec = {"models": [model], "api": {"num_replicas": args.api_replicas}}
    file = Path(tempfile.mkstemp(suffix=".yaml")[1])
    serve_file.write(file, spec, port=PORTS["omni_ray"])
    return [sys.executable, "-m", "omni_ray.cli", "serve", str(file), "--port", str(PORTS["omni_ray"])]


class _Running:
    """A server process, waited for until ``url`` answers 200, ended at exit."""

    def __init__(self, command: list[str], url: str, timeout_s: float = 400) -> None:
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
            )
        self._url, self._timeout_s = url, timeout_s

    def __enter__(self) -> None:
        start = time.monotonic()
        while time.monotonic() - start < self._timeout_s and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self._url, timeout=5):
                    print(f"ready after {time.monotonic() - start:.0f} s: {self._url}", flush=True)
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.__exit__()
        sys.exit("not ready:\n" + self._log.read_text()[-8000:])

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


if __name__ == "__main__":
    main()
