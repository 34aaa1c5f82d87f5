"""Weights of a tiny module in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

BLOCK = 32
"""Values that share a scale in Q8_0."""


def write(module: torch.nn.Module, file: Path, leave_out: str = "") -> Path:
    """The weights of the module's Linears in Q8_0, all others in float32."""
    linears = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    writer = gguf.GGUFWriter(file, "test")
    for name, tensor in module.state_dict().items():
        values = tensor.float().numpy()
        if name == leave_out:
            continue
        if name in linears and values.shape[-1] % BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
