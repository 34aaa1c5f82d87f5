"""GB/s at which the weights of a transformer come onto the device, page cache cold and warm.

    python -m benchmarks.loading [--folder FOLDER] [--gib 40] [--only REGEX] [--device cuda]

Writes a random Qwen-Image transformer of so many GiB, in files of 5 GiB, unless the folder holds one already. Then each
way to load it, with every library that is installed, and the limits of the machine itself, in one run. A warm row is
the better of two. On a CPU, for a try: `--gib 0.05 --heads 2`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open

from benchmarks.limits import LIMITS, Limit
from omni_ray.accel import weights
from omni_ray.accel.reader import Options
from omni_ray.plan.plan import counted

Tensors = dict[str, torch.Tensor]
Load = Callable[[Path, torch.device], Tensors]

SHARD_BYTES = 5 * 2**30
BLOCK_BYTES = 64 * 2**20
DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or will be; default: a temporary one")
    parser.add_argument("--gib", type=float, default=40.0)
    parser.add_argument("--heads", type=int, default=24, help="width of the model in heads of 128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="a regular expression: the rows to measure")
    parser.add_argument("--repeats", type=int, default=2, help="of a warm row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / weights.INDEX).is_file():
            start = time.perf_counter()
            write(folder, args.gib, args.heads)
            print(f"written in {time.perf_counter() - start:.1f} s")
        measure(folder, torch.device(args.device), args.only, args.repeats)


def write(folder: Path, gib: float, num_heads: int) -> None:
    """A checkpoint of about ``gib``, with the same random block over and over."""
    folder.mkdir(parents=True, exist_ok=True)
    one, two = (_size(_model(num_heads, layers)) for layers in (1, 2))
    model = _model(num_heads, max(1, round((gib * 2**30 - one) / (two - one)) + 1))
    model.save_config(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        if _bytes(shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    files, block = {}, torch.randn(BLOCK_BYTES // 2).to(DTYPE).view(torch.uint8).numpy()
    for i, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors"
        files |= dict.fromkeys(shard, file)
        _write_file(folder / file, shard, memoryview(block))
    index = {"metadata": {"total_size": _size(model)}, "weight_map": files}
    (folder / weights.INDEX).write_text(json.dumps(index))


def _model(num_heads: int, num_layers: int) -> Any:
    with torch.device("meta"), weights.default_dtype(DTYPE):
        return QwenImageTransformer2DModel(num_attention_heads=num_heads, num_layers=num_layers)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(model: torch.nn.Module) -> int:
    return _bytes(model.state_dict().values())


def _write_file(file: Path, tensors: Tensors, block: memoryview) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        first = stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()

        def put(start: int) -> None:
            count = min(len(block), end - start)
            assert os.pwrite(stream.fileno(), block[:count], first + start) == count

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(0, end, len(block))))
        os.fsync(stream.fileno())


def from_pretrained(folder: Path, device: torch.device) -> Tensors:
    return _state(QwenImageTransformer2DModel.from_pretrained(folder, dtype=DTYPE).to(device))


def with_device_map(folder: Path, device: torch.device) -> Tensors:
    return _state(QwenImageTransformer2DModel.from_pretrained(folder, dtype=DTYPE, device_map=str(device)))


def ours(num_threads: int, buffer_mib: int = 16) -> Load:
    options = Options(num_threads, buffer_mib * 2**20)

    def load(folder: Path, device: torch.device) -> Tensors:
        return _state(weights.load_model(QwenImageTransformer2DModel, folder, DTYPE, device, options=options))

    return load


def with_fastsafetensors(folder: Path, device: torch.device) -> Tensors:
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found]

    with fastsafe_open(_files(folder), nogds=True, device=_indexed(device)) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def with_runai(folder: Path, device: torch.device) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(_files(folder), device=str(device))
        # On the CPU a tensor is a view of a buffer that will be used again.
        return {name: each.clone() if device.type == "cpu" else each for name, each in streamer.get_tensors()}


def with_instanttensor(*, through_the_cache: bool) -> Load:
    def load(folder: Path, device: torch.device) -> Tensors:
        import instanttensor  # type: ignore[import-not-found]

        backend = instanttensor.BackendPolicy.BUFFERED if through_the_cache else None
        with instanttensor.safe_open(_files(folder), "pt", _indexed(device), backend=backend) as opened:
            return dict(opened.tensors())

    return load


def ways(device: torch.device) -> dict[str, Load]:
    """Every way to load that this machine has."""
    found: dict[str, Load] = {"from_pretrained, then to(device)": from_pretrained}
    found["from_pretrained(device_map)"] = with_device_map
    found |= {f"ours, {counted(threads, 'thread')}": ours(threads) for threads in (1, 4, 8, 16)}
    found |= {f"ours, 8 threads, buffers of {mib} MiB": ours(8, mib) for mib in (4, 64)}
    if importlib.util.find_spec("fastsafetensors"):
        found["fastsafetensors, without GPUDirect"] = with_fastsafetensors
    if importlib.util.find_spec("runai_model_streamer"):
        found["runai-model-streamer"] = with_runai
    if importlib.util.find_spec("instanttensor") and device.type == "cuda":
        found["instanttensor"] = with_instanttensor(through_the_cache=False)
        found["instanttensor, through the page cache"] = with_instanttensor(through_the_cache=True)
    return found


def _state(model: Any) -> Tensors:
    return dict(model.state_dict())


def _files(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.safetensors")))


def _indexed(device: torch.device) -> str:
    return f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" else str(device)


def measure(folder: Path, device: torch.device, only: str, repeats: int) -> None:
    """Print the table."""
    paths = [Path(file) for file in _files(folder)]
    num_bytes = sum(path.stat().st_size for path in paths)
    if device.type == "cuda":
        torch.cuda.init()
        print(torch.cuda.get_device_name(device), end=", ")
    print(f"{num_bytes / 2**30:.1f} GiB in {len(paths)} files, {os.cpu_count()} CPUs, torch {torch.__version__}")
    drop(paths)
    print(f"of the files {cached(paths):.0%} are in the page cache after it was dropped\n")
    print("| | cold GB/s | warm GB/s |\n|---|---|---|")
    for name, limit in LIMITS.items():
        if re.search(only, name):
            _row(name, *_limit(limit, paths, device, repeats))
    for name, load in ways(device).items():
        if re.search(only, name):
            drop(paths)
            cold = num_bytes / _seconds(load, folder, device) / 1e9
            warm = [num_bytes / _seconds(load, folder, device) / 1e9 for _ in range(repeats)]
            _row(name, cold, max(warm))


def _row(name: str, cold: float | None, warm: float | None) -> None:
    print(f"| {name} | {'' if cold is None else f'{cold:.2f}'} | {'' if warm is None else f'{warm:.2f}'} |", flush=True)


def _limit(limit: Limit, paths: list[Path], device: torch.device, repeats: int) -> tuple[float | None, float | None]:
    cold = None
    if limit.reads:
        drop(paths)
        cold = limit.measure(paths, device)
    warm = [] if limit.is_direct else [limit.measure(paths, device) for _ in range(repeats)]
    return cold, max((each for each in warm if each is not None), default=None)


def _seconds(load: Load, folder: Path, device: torch.device) -> float:
    """Seconds until all weights are on the device, from memory that has to be allocated. Checks some of them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # type: ignore[attr-defined]
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    tensors = load(folder, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    index: dict[str, str] = json.loads((folder / weights.INDEX).read_text())["weight_map"]
    assert tensors.keys() == index.keys()
    for name in sorted(index)[:: max(1, len(index) // 20)]:
        with safe_open(folder / index[name], framework="pt") as opened:
            wanted = opened.get_tensor(name).view(torch.int16)
        assert torch.equal(tensors[name].cpu().view(torch.int16), wanted), f"{name} differs"
    return seconds


def drop(paths: list[Path]) -> None:
    """Take the files out of the page cache."""
    gc.collect()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached(paths: list[Path]) -> float:
    """Which part of the files is in the page cache."""
    libc, present, total = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in paths:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
            present, total = present + sum(each & 1 for each in pages), total + len(pages)
            del first
    return present / total


if __name__ == "__main__":
    main()
