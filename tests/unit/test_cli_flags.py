"""`omni-ray serve MODEL` with the flags of vLLM and vLLM-Omni: the spec that they mean, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from omni_ray.cli import main
from omni_ray.cli.flags import FLAGS, file_of
from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.errors import ConfigError

QWEN_IMAGE = "Qwen/Qwen-Image"


def group(model: str, *flags: str, type_: str | None = None) -> Any:
    return file_of(model, flags, type_).omni_applications[0].args.models[0]


def test_a_diffusion_model() -> None:
    made = group(
        QWEN_IMAGE,
        *("--enable-teacache", "--teacache-threshold", "0.15", "--enable-layerwise-cpu-offload", "--quantization=int8"),
        *("--ulysses-degree", "2", "-tp", "2", "--gpu-memory-utilization", "0.8", "--attention-backend", "cudnn"),
        *("--served-model-name", "pictures", "--enforce-eager", "--cpu-offload-gb", "10"),
    )
    assert isinstance(made, DitGroup)
    assert (made.name, made.source) == ("pictures", QWEN_IMAGE)
    assert (made.cache.kind, made.cache.threshold) == ("teacache", 0.15)
    assert (made.offload.kind, made.offload.cpu_offload_gb) == ("layerwise", 10)
    assert (made.quantization.kind, made.attention.backend, made.compile.mode) == ("int8", "cudnn", "none")
    assert (made.parallel.ulysses, made.parallel.tensor, made.memory.gpu_memory_utilization) == (2, 2, 0.8)


def test_both_caches_and_the_peers_own_names() -> None:
    assert group(QWEN_IMAGE, "--enable-cache-dit", "--enable-teacache").cache.kind == "both"
    made = group(QWEN_IMAGE, "--cache-backend", "tea_cache")
    assert made.cache.kind == "teacache"
    made = group(QWEN_IMAGE, "--cache-backend", "cache_dit", "--cache-config", '{"Fn_compute_blocks": 1}')
    assert made.cache.cache_dit.Fn_compute_blocks == 1
    made = group(QWEN_IMAGE, "--cache-backend", "tea_cache", "--cache-config", '{"rel_l1_thresh": 0.3}')
    assert made.cache.threshold == 0.3
    assert group(QWEN_IMAGE, "--enable-cpu-offload").offload.kind == "model"
    assert group(QWEN_IMAGE, "--diffusion-attention-backend", "CUDNN_ATTN").attention.backend == "cudnn"
    assert group(QWEN_IMAGE, "--diffusion-kv-cache-dtype", "fp8").attention.backend == "fa3_fp8"
    assert group(QWEN_IMAGE, "--diffusion-kv-cache-dtype", "auto").attention.backend == "auto"
    for flags in (("flash_attn", "fp8"), ("FLASH_ATTN", "fp8")):
        both = ("--diffusion-attention-backend", flags[0], "--diffusion-kv-cache-dtype", flags[1])
        assert group(QWEN_IMAGE, *both).attention.backend == "fa3_fp8"
    with pytest.raises(ConfigError, match=r"--diffusion-kv-cache-dtype: 'mxfp8' cannot be read: .* which is auto"):
        group(QWEN_IMAGE, "--diffusion-kv-cache-dtype", "mxfp8")


def test_every_lever_has_a_flag() -> None:
    flags = ["--quantization", "int8", "--quantization-components", "transformer", "text_encoder"]
    flags += ["--quantization-skip", "*.proj_out", "--compile-mode", "regional", "--disable-cuda-graphs"]
    made = group(QWEN_IMAGE, *flags, "--max-steps", "60", "--max-frames", "5")
    assert made.quantization.components == ("transformer", "text_encoder")
    assert made.quantization.skip == ("*.proj_out",)
    assert (made.compile.mode, made.compile.cuda_graphs) == ("regional", False)
    assert (made.limits.max_steps, made.limits.max_frames) == (60, 5)
    flags = ["--enable-teacache", "--teacache-coefficients", "2", "0.5", "--teacache-max-consecutive-skips", "3"]
    cache = group(QWEN_IMAGE, *flags).cache
    assert (cache.coefficients, cache.max_consecutive_skips) == ((2, 0.5), 3)
    flags = ["--enable-teacache", "--teacache-calibration", "c.json", "--teacache-psnr", "32"]
    assert group(QWEN_IMAGE, *flags).cache.quality.psnr == 32


def test_a_language_model_takes_vllms_flags() -> None:
    made = group("Qwen/Qwen3-8B", "--max-model-len", "4096", "-tp", "2", "--enable-prefix-caching", "--dtype=bfloat16")
    assert isinstance(made, ArGroup)
    assert made.engine_args == {"max_model_len": 4096, "enable_prefix_caching": True}
    assert (made.parallel.tensor, made.dtype) == (2, "bfloat16")


def test_every_flag_means_a_key_of_the_spec() -> None:
    values = {"int": "2", "float": "0.5", "loads": "{}"}
    own = {"device": "cpu", "dtype": "float32", "load_format": "dummy", "quantization.kind": "int8"}
    own |= {"cache.kind": "teacache", "parallel.cfg": "2", "cache.calibration": "x", "compile.mode": "regional"}
    own |= {"cache.coefficients": "[1, 0]", "cache.quality.psnr": "32", "quantization": "fp8"}
    needs = {"offload.cpu_offload_gb": ["--enable-cpu-offload"], "cache.threshold": ["--enable-teacache"]}
    needs |= {"cache.calibration": ["--enable-teacache"], "cache.cache_dit": ["--enable-cache-dit"]}
    needs |= {key: ["--enable-teacache"] for key in ("cache.coefficients", "cache.max_consecutive_skips")}
    needs |= {"cache.quality.psnr": ["--enable-teacache", "--teacache-calibration", "x"]}
    needs |= {key: ["--quantization", "int8"] for key in ("quantization.components", "quantization.skip")}
    own |= {"quantization.files": "transformer=x"}
    needs |= {"quantization.files": ["--quantization", "gguf"]}
    for flag in FLAGS:
        for type_ in flag.types:
            value = own.get(flag.path, values.get(getattr(flag.convert, "__name__", ""), "x"))
            others = needs.get(flag.path, []) if type_ == "dit" else []
            flags = [flag.names[0]] if flag.constant is not None else [flag.names[0], value]
            group("demo:image", *others, *flags, type_=type_)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (
            QWEN_IMAGE,
            ["--enable-teecache"],
            "--enable-teecache is no flag of a dit model; did you mean '--enable-teacache'",
        ),
        (QWEN_IMAGE, ["--teacache-threshold"], "--teacache-threshold needs a value"),
        (QWEN_IMAGE, ["--teacache-threshold", "low"], "--teacache-threshold: 'low' cannot be read"),
        (QWEN_IMAGE, ["--enable-teacache=yes"], "--enable-teacache takes no value, but 'yes' came"),
        (QWEN_IMAGE, ["--teacache-threshold", "0.1"], "cache.threshold: is TeaCache's; set kind: teacache"),
        (QWEN_IMAGE, ["--enable-cpu-offload", "--enable-layerwise-offload"], "has set offload.kind to 'model' already"),
        (QWEN_IMAGE, ["now"], "'now' is no flag"),
        ("/no/where", [], "/no/where: nothing is known of it here, so say --type ar or --type dit"),
    ],
)
def test_what_is_wrong_is_said(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        file_of(model, flags, None)
    assert message in str(raised.value)


def test_the_file_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", QWEN_IMAGE, "--show-yaml", "--enable-teacache", "--port", "9000"])
    assert not ended.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["applications"][0]["args"]["models"] == [
        {"name": "Qwen-Image", "type": "dit", "source": QWEN_IMAGE, "cache": {"kind": "teacache"}}
    ]


def test_flags_do_not_go_with_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "deployments/omni.yaml", "--enable-teacache"])
    assert "is a file, which says all of its models; flags are for a MODEL" in str(ended.value.code)


def test_flags_before_the_model_are_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--tensor-parallel-size", "2", QWEN_IMAGE])
    assert "--tensor-parallel-size stands before MODEL; put MODEL first" in str(ended.value.code)


def test_values_of_vllms_flags() -> None:
    made = group("Qwen/Qwen3-8B", "--no-enable-prefix-caching", "--cudagraph-capture-sizes", "1", "2", "--seed", "-1")
    assert made.engine_args == {"enable_prefix_caching": False, "cudagraph_capture_sizes": [1, 2], "seed": -1}
