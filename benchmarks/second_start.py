"""Seconds of a compiled transformer's first forward, in a process that finds no compile cache and in one that does.

    python -m benchmarks.second_start FOLDER [--size 1024]

What a second replica, or a restart, still pays for compilation. "Compile" is the first forward less a later one. Needs
a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import torch

from benchmarks.alone import arguments_of
from benchmarks.forward import COMPILED, CUDNN, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.source, args.size)
        return
    print("| | first forward s | a later one ms | compile s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.second_start", args.source, "--size", str(args.size), "--child"]
        compile_s = []
        for start in ("first start", "second start"):
            done = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
            )
            first_s, ms = map(float, done.stdout.splitlines()[-1].split())
            compile_s.append(first_s - ms / 1000)
            print(f"| {start} | {first_s:.1f} | {ms:.1f} | {compile_s[-1]:.1f} |", flush=True)
    print(f"\nthe second start compiles for {compile_s[1] / compile_s[0]:.0%} of the first one's time")


@torch.no_grad()
def child(source: str, size: int) -> None:
    kind, arguments = arguments_of(source, size)
    print(*measured(kind, arguments, COMPILED | CUDNN))


if __name__ == "__main__":
    main()
