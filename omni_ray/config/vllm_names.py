"""Names that `vllm serve` gives to what an AR group has keys of its own for, and to its quantization methods."""

from __future__ import annotations

from typing import Literal

ALIASES = {
    "model": "source",
    "served_model_name": "name",
    "dtype": "dtype",
    "quantization": "quantization",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "nnodes": "parallel.num_nodes",
    "gpu_memory_utilization": "memory.gpu_memory_utilization",
    "cpu_offload_gb": "offload.cpu_offload_gb",
    "trust_remote_code": "trust_remote_code",
    "load_format": "load_format",
}
"""The keys of a model, by vLLM's names."""

ELSEWHERE = {"api_key": "api.keys_file", "allowed_media_domains": "api.media_hosts"}
"""What the endpoint does before a request comes to vLLM."""

PICKLED_FORMATS = ("pt", "npcache", "hf")
"""Load formats that read pickles, or do so where there is nothing else."""

Quantization = Literal[
    "auto_awq", "auto_gptq", "awq", "awq_marlin", "bitsandbytes", "compressed-tensors", "deepseek_v4_fp8",
    "experts_int8", "fbgemm_fp8", "fp8", "fp8_per_block", "fp8_per_channel", "fp8_per_tensor", "fp_quant", "gguf",
    "gpt_oss_mxfp4", "gptq", "gptq_marlin", "humming", "inc", "int8_per_channel_weight_only", "modelopt",
    "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8", "moe_wna16", "mxfp4", "mxfp8", "nvfp4_per_token", "online",
    "ptpc_fp8", "quark", "torchao",
]  # fmt: skip
"""Those of the releases that omni_ray runs with."""
