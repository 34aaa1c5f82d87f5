"""Reads tensors of safetensors files in several threads, straight into tensors on the device.

A thread reads into a buffer that the device can copy from by itself (pinned), and fills a second one meanwhile. Python
only starts these: neither the reads nor the copies hold its lock.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_ray.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with the bytes that are read so far, and those that will be."""

REPORT_INTERVAL_S = 0.2
MAX_HEADER_BYTES = 100 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class UnknownFormat(Exception):
    """A tensor has a number format that torch does not have."""


@dataclass(frozen=True)
class Options:
    """How files are read. A thread has two buffers on a GPU, which it pins."""

    num_threads: int = 8
    buffer_bytes: int = 16 * 2**20


DEFAULT = Options()


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes ``start`` to ``end`` of it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """What rank ``index`` of ``size`` keeps of a tensor: that part of each block of dimension ``dim``, joined."""

    dim: int
    block_sizes: tuple[int, ...]
    index: int
    size: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        return (*whole[: self.dim], sum(self.block_sizes) // self.size, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Target:
    """A tensor to read, the tensor that it is read into, converted to its dtype, and the part of it that is wanted."""

    stored: Stored
    into: torch.Tensor
    part: Part | None = None


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file, of which none is read.

    Raises ConfigError where the file is no safetensors file or is shorter than it says, UnknownFormat.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        first, found = 8 + length, {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (first + offset for offset in entry["data_offsets"])
                if entry["dtype"] not in DTYPES:
                    raise UnknownFormat(f"{name} has the number format {entry['dtype']}")
                found[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no whole safetensors file ({error!r}); download it again") from error
    needed = max((stored.end for stored in found.values()), default=0)
    if size < needed:
        raise ConfigError(f"{file} has {size} bytes, but its tensors end at byte {needed}; download it again")
    return found


def read(
    targets: Iterable[Target],
    device: torch.device,
    progress: Progress = lambda done, total: None,
    options: Options = DEFAULT,
) -> None:
    """Read all ``targets``, whose tensors are on ``device``. What was read is there when it returns.

    Args:
        progress: called in the calling thread, every `REPORT_INTERVAL_S`.

    Raises ConfigError where a file ends too early, and what the operating system says where one cannot be read.
    """
    most = options.buffer_bytes
    runs = list(_runs([piece for target in targets for piece in _pieces(target, most)], most))
    work, num_threads = _Work(runs), min(options.num_threads, len(runs))
    total = sum(run.end - run.start for run in runs)
    descriptors = {file: os.open(file, os.O_RDONLY) for file in sorted({run.file for run in runs})}
    size = max((run.end - run.start for run in runs), default=0)
    try:
        with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="weights") as pool:
            threads = [pool.submit(_read_runs, work, descriptors, device, size) for _ in range(num_threads)]
            _follow(threads, work, lambda done: progress(done, total))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _follow(threads: Sequence[Future[None]], work: _Work, progress: Callable[[int], None]) -> None:
    """Tell the progress until all threads have ended. After the first error the others stop, and it is raised."""
    waiting: Iterable[Future[None]] = threads
    try:
        while waiting:
            done, waiting = wait(waiting, REPORT_INTERVAL_S, FIRST_EXCEPTION)
            for thread in done:
                thread.result()
            progress(work.num_bytes)
    finally:
        work.stop()


@dataclass(frozen=True)
class _Piece:
    """Whole rows of a tensor that lie one after another in a file, and for columns of them where they go."""

    file: Path
    start: int
    end: int
    dtype: torch.dtype
    columns: tuple[tuple[slice, torch.Tensor], ...]
    """Destinations have the shape [rows, columns]."""


@dataclass(frozen=True)
class _Run:
    """Pieces that are read at once."""

    file: Path
    start: int
    end: int
    pieces: tuple[_Piece, ...]


def _pieces(target: Target, most: int) -> Iterator[_Piece]:
    """The target in pieces of at most ``most`` bytes, or of one row where a row has more.

    The rows are the tensor's dimensions before that of the part. Of a single row only what is wanted is read.
    """
    stored, part = target.stored, target.part
    if not target.into.numel():
        return
    dim = part.dim if part else 0
    num_rows = _product(stored.shape[:dim])
    inner = _product(stored.shape[dim + 1 :])
    width = _product(stored.shape) // num_rows
    wanted = list(_wanted(part, inner)) if part else [slice(0, width)]
    into = target.into.view(num_rows, -1)
    if num_rows == 1:
        yield from _pieces_of_row(stored, wanted, into[0], max(1, most // stored.dtype.itemsize))
        return
    row_bytes = width * stored.dtype.itemsize
    step = max(1, most // row_bytes)
    for row in range(0, num_rows, step):
        rows, column, columns = into[row : row + step], 0, []
        for each in wanted:
            columns.append((each, rows[:, column : column + each.stop - each.start]))
            column += each.stop - each.start
        start = stored.start + row * row_bytes
        yield _Piece(stored.file, start, start + len(rows) * row_bytes, stored.dtype, tuple(columns))


def _pieces_of_row(stored: Stored, wanted: list[slice], into: torch.Tensor, step: int) -> Iterator[_Piece]:
    column, size = 0, stored.dtype.itemsize
    for each in wanted:
        for first in range(each.start, each.stop, step):
            count = min(step, each.stop - first)
            start = stored.start + first * size
            columns = ((slice(0, count), into[column : column + count].unsqueeze(0)),)
            yield _Piece(stored.file, start, start + count * size, stored.dtype, columns)
            column += count


def _wanted(part: Part, inner: int) -> Iterator[slice]:
    """Which values of a row are the part's."""
    first = 0
    for block in part.block_sizes:
        share = block // part.size
        start = first + part.index * share
        yield slice(start * inner, (start + share) * inner)
        first += block


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _runs(pieces: list[_Piece], most: int) -> Iterator[_Run]:
    """Pieces that follow each other in a file, joined up to ``most`` bytes."""
    joined: list[_Piece] = []
    for piece in sorted(pieces, key=lambda each: (each.file, each.start)):
        follows = joined and joined[-1].file == piece.file and joined[-1].end == piece.start
        if joined and not (follows and piece.end - joined[0].start <= most):
            yield _Run(joined[0].file, joined[0].start, joined[-1].end, tuple(joined))
            joined = []
        joined.append(piece)
    if joined:
        yield _Run(joined[0].file, joined[0].start, joined[-1].end, tuple(joined))


class _Work:
    """The runs that no thread has taken yet, and the bytes that are read."""

    def __init__(self, runs: list[_Run]) -> None:
        self._runs = iter(runs)
        self._lock = threading.Lock()
        self._stopped = False
        self.num_bytes = 0

    def take(self) -> _Run | None:
        with self._lock:
            return None if self._stopped else next(self._runs, None)

    def done(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


def _read_runs(work: _Work, descriptors: Mapping[Path, int], device: torch.device, size: int) -> None:
    """What one thread does: with two buffers, so that one is filled while the other is copied."""
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream) if stream else nullcontext():
        if stream:  # the memory that is written may still be read by what the device was asked for before
            stream.wait_stream(torch.cuda.default_stream(device))
        buffers = [_Buffer(size, on_gpu) for _ in range(2 if on_gpu else 1)]
        while (run := work.take()) is not None:
            buffers.append(buffers.pop(0))
            buffers[-1].fill(descriptors[run.file], run)
            buffers[-1].copy(run, device)
            work.done(run.end - run.start)
        if stream:
            stream.synchronize()


class _Buffer:
    """Host memory that a run is read into, pinned where a GPU copies from it."""

    def __init__(self, size: int, pinned: bool) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        array: Any = self._bytes.numpy()
        self._view = memoryview(array)
        self._copied = torch.cuda.Event(blocking=True) if pinned else None

    def fill(self, descriptor: int, run: _Run) -> None:
        """Read the run, after what was copied from here last has arrived."""
        if self._copied:
            self._copied.synchronize()
        done, size = 0, run.end - run.start
        while done < size:
            count = os.preadv(descriptor, [self._view[done:size]], run.start + done)
            if not count:
                message = f"{run.file} ends at byte {run.start + done}, but its tensors need {run.end}"
                raise ConfigError(f"{message}; download it again")
            done += count

    def copy(self, run: _Run, device: torch.device) -> None:
        """Start to copy every piece to where it goes."""
        for piece in run.pieces:
            first = piece.start - run.start
            raw = self._bytes[first : first + piece.end - piece.start]
            raw = raw.clone() if first % piece.dtype.itemsize else raw  # as another dtype it has to be aligned
            rows = raw.view(piece.dtype).view(len(piece.columns[0][1]), -1)
            if any(into.dtype != piece.dtype or into.shape != rows.shape for _, into in piece.columns):
                rows = rows.to(device, non_blocking=True)  # the device cuts and converts faster than the host
            for columns, into in piece.columns:
                into.copy_(rows[:, columns], non_blocking=True)
        if self._copied:
            self._copied.record()
