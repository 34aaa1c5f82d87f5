"""Writes a trained pipeline as the folder that the package ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_pipeline(pipeline: Any, folder: Path, defaults: dict[str, Any]) -> None:
    """Writes the diffusers folder, in the pipeline's dtype, and ``omni_ray.json`` with the calls' defaults.

    The tokenizers' class is written under the name that every transformers release knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder)
    for path in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "omni_ray.json").write_text(json.dumps({"defaults": defaults}, indent=2) + "\n")
