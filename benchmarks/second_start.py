"""Seconds of a compiled transformer's first forward, in a process that finds no compile cache and in one that does.

    python -m benchmarks.second_start FOLDER [--size 1024]

What a second replica, or a restart, still pays for compilation. "Compile" is what the first forward takes longer
than that of a process that compiles nothing. Needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import torch

from benchmarks.alone import arguments_of
from benchmarks.forward import measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--row", default="compiled", help="of benchmarks.forward")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.source, args.size, args.child)
        return
    print("| | first forward s | a later one ms | compile s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.second_start", args.source, "--size", str(args.size), "--child"]
        firsts = []
        for start, row in (("not compiled", "eager"), ("first start", args.row), ("second start", args.row)):
            done = subprocess.run(
                [*command, row],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
            )
            first_s, ms = map(float, done.stdout.splitlines()[-1].split())
            firsts.append(first_s)
            print(f"| {start} | {first_s:.1f} | {ms:.1f} | {first_s - firsts[0]:.1f} |", flush=True)
    share = (firsts[2] - firsts[0]) / (firsts[1] - firsts[0])
    print(f"\nthe second start compiles for {share:.0%} of the first one's time")


@torch.no_grad()
def child(source: str, size: int, row: str) -> None:
    kind, arguments = arguments_of(source, size)
    print(*measured(kind, arguments, row))


if __name__ == "__main__":
    main()
