"""What the machine itself allows when weights are loaded: reads, copies in memory, copies to the device."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from omni_ray.plan.plan import counted

BLOCK_BYTES = 16 * 2**20
COPY_BYTES = 2**30
NUM_COPIES = 4
REGISTERED_BYTES = 256 * 2**20
REGISTER_READ_ONLY = 8
"""cudaHostRegisterReadOnly."""


@dataclass(frozen=True)
class Limit:
    """``measure`` gives GB/s, None where this machine cannot do it.

    ``reads``: the files, so that it matters whether they are in the page cache; ``is_direct``: past that.
    """

    measure: Callable[[Sequence[Path], torch.device], float | None]
    reads: bool = False
    is_direct: bool = False


def read_files(num_threads: int, flags: int = 0) -> Callable[[Sequence[Path], torch.device], float | None]:
    """Read all files by `preadv` into a buffer for each thread. ``flags`` are more flags of `open`."""

    def measure(paths: Sequence[Path], device: torch.device) -> float | None:
        blocks = [(path, start) for path in paths for start in range(0, path.stat().st_size, BLOCK_BYTES)]
        try:
            opened = {path: os.open(path, os.O_RDONLY | flags) for path in paths}
        except OSError:
            return None

        def work(first: int) -> int:
            # A map of its own begins at a page, as direct reads need it.
            with mmap.mmap(-1, BLOCK_BYTES) as buffer:
                view, num_bytes = memoryview(buffer), 0
                for path, start in blocks[first::num_threads]:
                    num_bytes += os.preadv(opened[path], [view], start)
                view.release()
                return num_bytes

        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(num_threads) as pool:
                num_bytes = sum(pool.map(work, range(num_threads)))
        except OSError:
            return None
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        return num_bytes / (time.perf_counter() - start) / 1e9

    return measure


def copy_memory(num_threads: int) -> Callable[[Sequence[Path], torch.device], float | None]:
    """Copy in main memory: bytes written, of which each was read once."""

    def measure(paths: Sequence[Path], device: torch.device) -> float | None:
        num_bytes = COPY_BYTES // num_threads
        sources = [torch.ones(num_bytes, dtype=torch.uint8).numpy() for _ in range(num_threads)]
        targets = [torch.ones(num_bytes, dtype=torch.uint8).numpy() for _ in range(num_threads)]

        def work(i: int) -> None:
            for _ in range(NUM_COPIES):
                targets[i][:] = sources[i]

        start = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(num_threads)))
        return NUM_COPIES * num_bytes * num_threads / (time.perf_counter() - start) / 1e9

    return measure


def copy_to_device(*, pinned: bool) -> Callable[[Sequence[Path], torch.device], float | None]:
    """Copy from main memory to the GPU."""

    def measure(paths: Sequence[Path], device: torch.device) -> float | None:
        if device.type != "cuda":
            return None
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(NUM_COPIES):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        return NUM_COPIES * COPY_BYTES / (time.perf_counter() - start) / 1e9

    return measure


def register_mapped(num_threads: int) -> Callable[[Sequence[Path], torch.device], float | None]:
    """Map the files, pin their pages of the page cache piece by piece, and copy those to the GPU."""

    def measure(paths: Sequence[Path], device: torch.device) -> float | None:
        if device.type != "cuda":
            return None
        cudart = torch.cuda.cudart()

        def work(path: Path) -> int | None:
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            pages = torch.from_numpy(np.frombuffer(mapped, np.uint8))
            target = torch.empty(REGISTERED_BYTES, dtype=torch.uint8, device=device)
            with torch.cuda.stream(torch.cuda.Stream(device)):
                for piece in pages.split(REGISTERED_BYTES):
                    if cudart.cudaHostRegister(piece.data_ptr(), piece.nbytes, REGISTER_READ_ONLY) != 0:
                        return None
                    target[: piece.nbytes].copy_(piece, non_blocking=True)
                    torch.cuda.current_stream(device).synchronize()
                    cudart.cudaHostUnregister(piece.data_ptr())
            return pages.nbytes

        start = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            done = list(pool.map(work, paths))
        if None in done:
            return None
        return sum(filter(None, done)) / (time.perf_counter() - start) / 1e9

    return measure


def pin(paths: Sequence[Path], device: torch.device) -> float | None:
    """Pin main memory that is not pinned yet."""
    if device.type != "cuda":
        return None
    torch._C._host_emptyCache()  # type: ignore[attr-defined]
    start = time.perf_counter()
    buffer = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    return buffer.nbytes / (time.perf_counter() - start) / 1e9


def allocate(piece_bytes: int) -> Callable[[Sequence[Path], torch.device], float | None]:
    """Allocate memory of the GPU in pieces that it does not have yet."""

    def measure(paths: Sequence[Path], device: torch.device) -> float | None:
        if device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        num_pieces = 8 * COPY_BYTES // piece_bytes
        start = time.perf_counter()
        pieces = [torch.empty(piece_bytes, dtype=torch.uint8, device=device) for _ in range(num_pieces)]
        torch.cuda.synchronize(device)
        return len(pieces) * piece_bytes / (time.perf_counter() - start) / 1e9

    return measure


LIMITS: dict[str, Limit] = {
    **{f"limit: read, {counted(n, 'thread')}": Limit(read_files(n), reads=True) for n in (1, 4, 8, 16)},
    "limit: read past the page cache, 16 threads": Limit(read_files(16, os.O_DIRECT), reads=True, is_direct=True),
    **{f"limit: copy in memory, {counted(n, 'thread')}": Limit(copy_memory(n)) for n in (1, 8)},
    "limit: pinned memory to the GPU": Limit(copy_to_device(pinned=True)),
    "limit: other memory to the GPU": Limit(copy_to_device(pinned=False)),
    "limit: mapped files, pinned and copied to the GPU": Limit(register_mapped(8), reads=True),
    "limit: pin memory": Limit(pin),
    "limit: allocate on the GPU, 32 MiB each": Limit(allocate(32 * 2**20)),
    "limit: allocate on the GPU at once": Limit(allocate(8 * COPY_BYTES)),
}
