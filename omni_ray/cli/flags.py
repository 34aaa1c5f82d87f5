"""``omni-ray serve MODEL --flag …``: a file of one model, from the flags that users of vLLM and vLLM-Omni know."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omni_ray.config.load import load_file
from omni_ray.config.nearest import hint
from omni_ray.config.serve_file import ServeFile
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint

Convert = Callable[[str], Any]


@dataclass(frozen=True)
class Flag:
    """``names`` set ``path`` in the model to their value, or those without one to ``constant``."""

    names: tuple[str, ...]
    path: str
    convert: Convert = str
    constant: Any = None
    types: tuple[str, ...] = ("ar", "dit")


def _list(text: str) -> list[str]:
    """``[a, b]``, as several values come, or one."""
    return [each.strip() for each in text.removeprefix("[").removesuffix("]").split(",")]


def _pairs_of(text: str) -> dict[str, str]:
    """``name=value,name=value``."""
    return dict(each.partition("=")[::2] for each in _list(text))


BACKENDS = {"FLASH_ATTN": "fa3", "CUDNN_ATTN": "cudnn", "SAGE_ATTN": "sage", "TORCH_SDPA": "native"}
"""vLLM-Omni's names of attention kernels, and ours."""


def _attention_in(dtype: str) -> str:
    if dtype in ("mxfp8", "mxfp4"):
        raise ValueError("attention is computed in fp8, or in the model's own dtype, which is auto")
    return {"auto": "auto", "float": "auto"}.get(dtype, f"fa3_{dtype}")


DIT = ("dit",)
FLAGS = (
    Flag(("--served-model-name",), "name"),
    Flag(("--dtype",), "dtype"),
    Flag(("--device",), "device"),
    Flag(("--load-format",), "load_format"),
    Flag(("--trust-remote-code",), "trust_remote_code", constant=True),
    Flag(("--num-replicas", "--data-parallel-size"), "num_replicas", int),
    Flag(("--tensor-parallel-size", "-tp"), "parallel.tensor", int),
    Flag(("--pipeline-parallel-size",), "parallel.pipeline", int, types=("ar",)),
    Flag(("--ulysses-degree", "--usp"), "parallel.ulysses", int, types=DIT),
    Flag(("--ring-degree", "--ring"), "parallel.ring", int, types=DIT),
    Flag(("--cfg-parallel-size",), "parallel.cfg", int, types=DIT),
    Flag(("--gpu-memory-utilization",), "memory.gpu_memory_utilization", float),
    Flag(("--cpu-offload-gb",), "offload.cpu_offload_gb", float),
    Flag(("--enable-cpu-offload",), "offload.kind", constant="model", types=DIT),
    Flag(
        ("--enable-layerwise-cpu-offload", "--enable-layerwise-offload"),
        "offload.kind",
        constant="layerwise",
        types=DIT,
    ),
    Flag(("--enable-sequential-cpu-offload",), "offload.kind", constant="sequential", types=DIT),
    Flag(("--quantization",), "quantization", types=("ar",)),
    Flag(("--quantization",), "quantization.kind", types=DIT),
    Flag(("--enable-teacache",), "cache.kind", constant="teacache", types=DIT),
    Flag(("--teacache-threshold",), "cache.threshold", float, types=DIT),
    Flag(("--teacache-calibration",), "cache.calibration", types=DIT),
    Flag(("--teacache-psnr",), "cache.quality.psnr", float, types=DIT),
    Flag(("--teacache-coefficients",), "cache.coefficients", yaml.safe_load, types=DIT),
    Flag(("--teacache-max-consecutive-skips",), "cache.max_consecutive_skips", int, types=DIT),
    Flag(("--enable-cache-dit",), "cache.kind", constant="cache_dit", types=DIT),
    Flag(("--cache-backend",), "cache.kind", lambda kind: kind.replace("tea_cache", "teacache"), types=DIT),
    Flag(("--cache-config",), "cache.cache_dit", json.loads, types=DIT),
    Flag(
        ("--attention-backend", "--diffusion-attention-backend"),
        "attention.backend",
        lambda name: BACKENDS.get(name.upper(), name),
        types=DIT,
    ),
    Flag(("--diffusion-kv-cache-dtype",), "attention.backend", _attention_in, types=DIT),
    Flag(("--enable-fused-qkv",), "attention.fused_qkv", constant=True, types=DIT),
    Flag(("--quantization-files",), "quantization.files", _pairs_of, types=DIT),
    Flag(("--quantization-components",), "quantization.components", _list, types=DIT),
    Flag(("--quantization-skip",), "quantization.skip", _list, types=DIT),
    Flag(("--enforce-eager",), "compile.mode", constant="none", types=DIT),
    Flag(("--compile-mode",), "compile.mode", types=DIT),
    Flag(("--enable-cuda-graphs",), "compile.cuda_graphs", constant=True, types=DIT),
    Flag(("--disable-cuda-graphs",), "compile.cuda_graphs", constant=False, types=DIT),
    Flag(("--vae-use-tiling",), "vae.tiling", constant=True, types=DIT),
    Flag(("--vae-use-slicing",), "vae.slicing", constant=True, types=DIT),
    Flag(("--max-num-seqs",), "batching.max_num_seqs", int, types=DIT),
    Flag(("--max-num-batched-tokens",), "batching.max_num_batched_tokens", int, types=DIT),
    Flag(("--max-pixels",), "limits.max_pixels", int, types=DIT),
    Flag(("--max-steps",), "limits.max_steps", int, types=DIT),
    Flag(("--max-frames",), "limits.max_frames", int, types=DIT),
)

OF_TEACACHE = {"rel_l1_thresh": "--teacache-threshold", "coefficients": "--teacache-coefficients"}
"""Keys of a `--cache-config` that are TeaCache's, and the flags that say the same."""


def file_of(model: str, flags: Sequence[str], type_: str | None) -> ServeFile:
    """The file that says the same. For an LLM, other flags are vLLM's own.

    Raises ConfigError where a flag or its value is wrong, or the type of the model is not known.
    """
    type_ = type_ or _type_of(model)
    name = Path(model).name.removeprefix("demo:") if not model.startswith("demo:") else model.replace(":", "-")
    group: dict[str, Any] = {"name": name, "type": type_, "source": model}
    asked: dict[str, Any] = {}
    for pair in _pairs(flags, type_):
        for flag, value in _spelt_out(*pair):
            _set(asked, flag, value, type_)
    group |= asked
    application = {
        "name": "omni",
        "route_prefix": "/",
        "import_path": "omni_ray.app:build",
        "args": {"models": [group]},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "flags.yaml")
        file.write_text(yaml.safe_dump({"applications": [application]}, sort_keys=False))
        try:
            return load_file(file)
        except ConfigError as error:
            raise ConfigError("\n".join(line.split(": ", 1)[-1] for line in error.message.splitlines())) from error


def _spelt_out(flag: str, value: str | None) -> list[tuple[str, str | None]]:
    """TeaCache's keys of a `--cache-config` as flags of their own."""
    try:
        config = json.loads(value or "") if flag == "--cache-config" else None
    except ValueError:
        config = None
    if not isinstance(config, dict) or not config or not config.keys() <= OF_TEACACHE.keys():
        return [(flag, value)]
    return [(OF_TEACACHE[key], json.dumps(each)) for key, each in config.items()]


def show(file: ServeFile) -> str:
    """The file as YAML."""
    return yaml.safe_dump(file.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _pairs(flags: Sequence[str], type_: str) -> list[tuple[str, str | None]]:
    """Each flag and its value, None where it has none; several values are one, with commas, in brackets."""
    if flags and not flags[0].startswith("-"):
        raise ConfigError(f"{flags[0]!r} is no flag; flags begin with --")
    starts = [i for i, each in enumerate(flags) if _is_flag(each)]
    pairs: list[tuple[str, str | None]] = []
    for start, end in zip(starts, [*starts[1:], len(flags)], strict=True):
        flag, equals, value = flags[start].partition("=")
        values = [*([value] if equals else []), *flags[start + 1 : end]]
        if _is_switch(flag, type_) and not equals and values:
            raise ConfigError(f"{values[0]!r} is no flag; flags begin with --")
        text = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
        pairs.append((flag, text if values else None))
    return pairs


def _is_flag(text: str) -> bool:
    return text.startswith("-") and not text[1:2].isdigit()


def _is_switch(flag: str, type_: str) -> bool:
    return any(flag in each.names and type_ in each.types and each.constant is not None for each in FLAGS)


def _set(asked: dict[str, Any], name: str, value: str | None, type_: str) -> None:
    flag = next((each for each in FLAGS if name in each.names and type_ in each.types), None)
    if flag is None:
        if type_ == "ar":
            key, is_off = name.lstrip("-").replace("-", "_"), value is None and name.startswith("--no-")
            asked.setdefault("engine_args", {})[key.removeprefix("no_") if is_off else key] = (
                False if is_off else _plain(value)
            )
            return
        known = sorted(each for flag in FLAGS if type_ in flag.types for each in flag.names)
        raise ConfigError(f"{name} is no flag of a {type_} model; {hint(name, known)}")
    if (value is None) != (flag.constant is not None):
        raise ConfigError(f"{name} needs a value" if value is None else f"{name} takes no value, but {value!r} came")
    try:
        converted = flag.constant if value is None else flag.convert(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {value!r} cannot be read: {error}") from error
    *parents, key = flag.path.split(".")
    block = asked
    for parent in parents:
        block = block.setdefault(parent, {})
    before = block.get(key)
    if key == "kind" and {before, converted} == {"teacache", "cache_dit"}:
        converted = "both"
    elif key == "backend" and {before, converted} == {"fa3", "fa3_fp8"}:  # fp8 is a mode of that kernel
        converted = "fa3_fp8"
    elif before not in (None, converted):
        raise ConfigError(f"{name}: another flag has set {flag.path} to {before!r} already; leave one of them out")
    block[key] = converted


def _plain(value: str | None) -> Any:
    """A number, a truth value, JSON, or the text itself."""
    return True if value is None else yaml.safe_load(value)


def _type_of(model: str) -> str:
    try:
        checkpoint = read_checkpoint(model)
    except ConfigError as error:
        raise ConfigError(f"{model}: nothing is known of it here, so say --type ar or --type dit") from error
    return "dit" if checkpoint.pipeline else "ar"


def help_text() -> str:
    """The flags by the type of model, for `omni-ray serve --help`."""
    lines = []
    for type_ in ("dit", "ar"):
        names = [f"{flag.names[0]}{'' if flag.constant is not None else ' …'}" for flag in FLAGS if type_ in flag.types]
        lines.append(f"flags of a {type_} MODEL: {', '.join(names)}")
    return "\n".join([*lines, "an ar MODEL takes every flag of `vllm serve` besides"])


def is_file(model: str) -> bool:
    """Whether what follows `serve` is a file and not a model."""
    return Path(model).suffix in (".yaml", ".yml", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE|MODEL", help="a Ray Serve config such as deployments/omni.yaml, or a model"
    )
    parser.add_argument("--type", choices=("ar", "dit"), help="of MODEL (default: by its checkpoint)")
    parser.add_argument("--show-yaml", action="store_true", help="print MODEL's file and stop")
