"""The cards (README.md) written beside the demo models' weights."""

from __future__ import annotations

from typing import Any

_IMAGE = """# demo:image

A small FLUX.1-architecture text-to-image pipeline (diffusers `FluxPipeline`), trained by this project from random
weights on procedurally drawn scenes alone. It draws one or two plain shapes at 256 x 256 pixels from captions like
`a red circle`, `a red circle on a blue background` or
`a small green triangle left of a large blue square on a yellow background`. It knows nothing else.

- Shapes: circle, square, triangle, diamond, star. Sizes: small, (unsaid: medium), large.
- Colours: red, orange, yellow, green, blue, purple, pink, black, white.
- Relations: left of, right of, above, below. An unsaid background is white (black where a shape is white).

Call it with `max_sequence_length=32`, 256 x 256, 20 steps (`omni_ray.json`): FluxPipeline masks no text tokens, so
another text length is not what it was trained on.

| Measured on held-out captions (combinations never trained on, every word must hold) | |
| --- | --- |
| Right | {all} |
| One shape | {one shape} |
| Two shapes | {two shapes} |
| Failures by kind | {failures} |
| Steps | 20 |
| Seconds an image, {dtype}, batches of {batch} | {seconds:.3f} on {hardware} |
| Seconds an image, float32, one at a time | {cpu_seconds:.2f} on {cpu} |
| Parameters | {params} |

Reproduce: `python -m omni_ray.demo.evaluate image`. Train: `python -m omni_ray.demo.train_image`.
"""

_VIDEO = """# demo:video

A small Wan2.2-architecture text-to-video pipeline (diffusers `WanPipeline`): two experts, `transformer` for high noise
and `transformer_2` for low noise, an `AutoencoderKLWan` and a `UMT5EncoderModel`, trained by this project from random
weights on procedurally drawn clips alone. It films one plain shape, 17 frames of 128 x 128 pixels, from captions like
`a red circle moving right` or `a small green square moving up on a blue background`. It knows nothing else.

- Shapes: circle, square, triangle, diamond, star. Sizes: small, (unsaid: medium), large.
- Colours: red, orange, yellow, green, blue, purple, pink, black, white.
- Directions: left, right, up, down. Unsaid: it stands still. An unsaid background is white (black for a white shape).

Call it with `max_sequence_length=16`, 17 frames, 128 x 128, 20 steps (`omni_ray.json`): the transformers mask no text
tokens, so another text length is not what they were trained on.

| Measured on held-out captions (combinations never trained on; first, middle and last frame; every word must hold) | |
| --- | --- |
| Right | {all} |
| Moving | {moving} |
| Standing still | {still} |
| Failures by kind | {failures} |
| Steps | 20 |
| Seconds a clip, {dtype}, batches of {batch} | {seconds:.3f} on {hardware} |
| Seconds a clip, float32, one at a time | {cpu_seconds:.2f} on {cpu} |
| Parameters | {params} |

Reproduce: `python -m omni_ray.demo.evaluate video`. Train: `python -m omni_ray.demo.train_video`.
"""

_CHAT = """# demo:chat

A small Qwen3-architecture language model, trained by this project from random weights on a procedural grammar alone.
It rewrites a loose request (`could you draw something round, the colour of a tomato, on the sea`) into a caption that
demo:image understands (`a red circle on a blue background`). It knows nothing else. Only the last request counts:
earlier turns and system messages do not change the answer. Its tokenizer writes text in lower case.

| Measured, greedy, exact match | |
| --- | --- |
{sets}
| Seconds an answer, {dtype}, batched | {seconds:.4f} on {hardware} |
| Parameters | {params:,} |

Reproduce: `python -m omni_ray.demo.evaluate chat`. Train: `python -m omni_ray.demo.train_chat`.
"""


def _diffusion(card: str, figures: dict[str, Any]) -> str:
    failures = ", ".join(f"{name} {count}" for name, count in figures["failures"].items() if count) or "none"
    params = ", ".join(f"{name} {count:,}" for name, count in figures["params"].items())
    return card.format(**(figures | {"failures": failures, "params": params}))


def image_card(figures: dict[str, Any]) -> str:
    """The card of ``demo:image``."""
    return _diffusion(_IMAGE, figures)


def video_card(figures: dict[str, Any]) -> str:
    """The card of ``demo:video``."""
    return _diffusion(_VIDEO, figures)


def chat_card(figures: dict[str, Any]) -> str:
    """The card of ``demo:chat``."""
    sets = "\n".join(f"| {name[0].upper()}{name[1:]} | {share} |" for name, share in figures["sets"].items())
    return _CHAT.format(**(figures | {"sets": sets}))
