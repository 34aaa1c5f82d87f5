"""What is done to the modules of a diffusers pipeline: cache, offload, quantization, compilation, attention kernel."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from omni_ray.config.block import Block, Positive


class CacheDitOptions(Block):
    """The options of the cache-dit library, under its own names and with its defaults."""

    Fn_compute_blocks: Positive = Field(8, description="First blocks, always computed: their change decides.")
    Bn_compute_blocks: int = Field(0, ge=0, description="Last blocks, always computed.")
    residual_diff_threshold: float = Field(
        0.08, ge=0, description="Relative change below which a step is skipped; higher reuses more."
    )
    max_accumulated_residual_diff_threshold: float | None = Field(
        None, gt=0, description="No step is skipped once the changes of a request add up to this."
    )
    max_warmup_steps: int = Field(8, ge=0, description="First steps, always computed.")
    warmup_interval: Positive = Field(1, description="Of the first steps, every how-manieth is computed.")
    max_cached_steps: int = Field(-1, ge=-1, description="Steps of a request that may be skipped; -1: any number.")
    max_continuous_cached_steps: int = Field(-1, ge=-1, description="Steps in a row that may be skipped.")
    taylorseer_order: int = Field(
        0, ge=0, le=4, description="TaylorSeer: skipped steps are forecast by this derivative; 0 is off."
    )
    steps_mask: Literal["slow", "medium", "fast", "ultra"] | None = Field(
        None, description="SCM: which steps may be skipped, by a mask of the library."
    )
    steps_computation_policy: Literal["dynamic", "static"] = Field(
        "dynamic", description="SCM: `static` skips what the mask lets, `dynamic` asks the threshold too."
    )


class Quality(Block):
    """What a cache may cost."""

    psnr: float = Field(gt=0, description="dB to the uncached image, in the mean over the calibration's prompts.")


class Cache(Block):
    """Reuse of computed denoise steps."""

    kind: Literal["none", "teacache", "cache_dit", "both"] = Field(
        "none", description="Which cache answers steps that can be skipped; `both`: Cache-DiT beneath TeaCache."
    )
    calibration: str | None = Field(
        None, description="TeaCache: a file that `omni-ray calibrate` wrote, in place of `coefficients`."
    )
    quality: Quality | None = Field(
        None, description="TeaCache: the likeness to keep, in place of `threshold`; needs a calibration."
    )
    cache_dit: CacheDitOptions = Field(default_factory=CacheDitOptions, description="Cache-DiT's own options.")
    threshold: float = Field(
        0.2, gt=0, description="TeaCache: estimated change that adds up before a step is computed; higher reuses more."
    )
    max_consecutive_skips: Positive = Field(4, description="TeaCache: steps in a row that may be skipped.")
    coefficients: tuple[float, ...] | None = Field(
        None, description="TeaCache: the model's polynomial, highest power first; null takes the family's."
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        others = self.model_fields_set - {"kind"}
        wrong = [f"{key}: is TeaCache's; set kind: teacache" for key in sorted(others - {"cache_dit"})]
        wrong = [] if self.kind in ("teacache", "both") else wrong
        if "cache_dit" in others and self.kind not in ("cache_dit", "both"):
            wrong.append("cache_dit: has Cache-DiT's options; set kind: cache_dit")
        if self.calibration and self.coefficients:
            wrong.append("coefficients: the calibration has its own; remove one of them")
        if self.quality and not self.calibration:
            wrong.append("quality: only a calibration knows which threshold keeps it; set calibration")
        if self.quality and "threshold" in others:
            wrong.append("threshold: quality chooses it; remove one of them")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


class DitOffload(Block):
    """Weights kept in host memory and brought to the device when needed."""

    kind: Literal["none", "model", "layerwise", "sequential"] = Field(
        "none",
        description="`model`: whole components, one on the device at a time; `sequential`: only transformers and "
        "encoders; `layerwise`: blocks of the transformers stream, encoders come when called.",
    )
    cpu_offload_gb: float = Field(
        0.0, ge=0, description="About so many GiB live in host memory (`layerwise`: of blocks); 0: all that may."
    )

    @model_validator(mode="after")
    def _of_a_kind(self) -> Self:
        if self.cpu_offload_gb and self.kind in ("none", "sequential"):
            raise ValueError(f"cpu_offload_gb: says nothing with kind {self.kind!r}; set kind: model or layerwise")
        return self


class DitQuantization(Block):
    """Weights and activations in fewer bits, converted on load or before."""

    kind: Literal["none", "int8", "int4", "fp8", "gguf"] = Field(
        "none",
        description="`int8`, `int4`: of the weights alone, which saves memory; `fp8`: of weights and activations, "
        "which saves time too, on GPUs from Ada and Hopper on; `gguf`: the weights are quantized in `files`.",
    )
    files: dict[str, str] = Field(
        default_factory=dict, description="`gguf`: components, by name, and the file on each node with their weights."
    )
    components: tuple[str, ...] | None = Field(
        None, description="Components of the pipeline to quantize, by name; null: its transformers."
    )
    skip: tuple[str, ...] = Field(
        (), description="Paths of layers that stay as they are, such as `transformer_blocks.0.*` (`*` stands for any)."
    )

    @model_validator(mode="after")
    def _of_a_kind(self) -> Self:
        if others := self.model_fields_set - {"kind"} if self.kind == "none" else set():
            raise ValueError("\n".join(f"{key}: says nothing with kind 'none'; set a kind" for key in sorted(others)))
        if self.kind == "gguf" and not self.files:
            raise ValueError("files: name a GGUF file for each component, such as `{transformer: /models/q4_0.gguf}`")
        meaningless = {"components", "skip"} if self.kind == "gguf" else {"files"}
        if wrong := sorted(meaningless & self.model_fields_set):
            raise ValueError("\n".join(f"{key}: says nothing with kind {self.kind!r}; remove it" for key in wrong))
        return self


class Compile(Block):
    """torch.compile of the transformer's repeated blocks (regional compilation)."""

    mode: Literal["auto", "none", "regional"] = Field(
        "auto", description="`regional` compiles each kind of block once; `auto` does so on GPUs."
    )
    dynamic: bool = Field(True, description="One graph for all sizes and batch sizes; false compiles each anew.")
    cuda_graphs: bool | None = Field(
        None,
        description="Record a transformer's kernels once per shape and replay them, which saves the host's time; null: "
        "where blocks are compiled, no cache, offload or other rank stands in the way, and the host is the slower one.",
    )


class Vae(Block):
    """How the autoencoder saves memory, at the price of time."""

    tiling: bool = Field(
        False,
        description="Large pictures are decoded and encoded in overlapping tiles, whose seams are blended: nearly the "
        "same picture.",
    )
    slicing: bool = Field(False, description="Several pictures of a request are decoded one by one.")


class Attention(Block):
    """The attention kernel, and the projections before it."""

    backend: str = Field(
        "auto",
        description="`native`, `cudnn`, `fa3`, `fa3_fp8`, `flash`, `sage`, `xformers`, `flex` or another backend of "
        "diffusers; `auto` takes the fastest that is installed and exact, by a trial at start, at about 1024x1024 or "
        "480p of video. `fa3_fp8` computes attention in 8 bits. Both `fa3` are of Hopper cards, and leave calls with a "
        "mask to PyTorch's kernel.",
    )
    fused_qkv: bool = Field(
        False, description="One matrix product for queries, keys and values, in FLUX.1, FLUX.2, Wan2.2 and Helios."
    )
