"""``omni-ray generate PROMPT``: text to the terminal, images and videos to files, from a server or in this process."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_ray.errors import ConfigError

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}
FIELDS = {
    "n": (int, "N", "how many outputs"),
    "size": (str, "WxH", "in pixels"),
    "num_inference_steps": (int, "N", "denoise steps"),
    "guidance_scale": (float, "X", "how closely to follow the prompt"),
    "guidance_scale_2": (float, "X", "of the second of two transformers"),
    "negative_prompt": (str, "TEXT", "what not to show"),
    "strength": (float, "X", "share of the input image to redraw, from 0 to 1"),
    "num_frames": (int, "N", "frames of a video"),
    "seconds": (float, "S", "length of a video, instead of --num-frames"),
    "fps": (int, "N", "frames a second of a video"),
    "max_tokens": (int, "N", "tokens of an LLM's answer at most"),
    "temperature": (float, "X", "of an LLM"),
    "seed": (int, "N", "equal seeds give equal outputs"),
}
"""By the API's names: type, what stands for the value in the help, and the help."""

SHORT = {"n": "-n", "num_inference_steps": "--steps"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for. ``fields`` are the API's, those that were said; ``model`` may be empty."""

    prompt: str
    model: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    images: tuple[Path, ...] = ()
    mask: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far the work is; ``doing`` are words for a person."""

    doing: str
    step: int = 0
    num_steps: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, to be printed as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Caption:
    """The prompt that a chain made of what was said."""

    text: str


@dataclass(frozen=True, slots=True)
class Output:
    """An encoded image or video; ``format`` is that of :class:`omni_ray.messages.Media`."""

    data: bytes
    format: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What it took, as the ``omni`` part of a reply tells it."""

    omni: dict[str, Any]


Update = Step | Text | Caption | Output | Cost


def add_arguments(parser: argparse.ArgumentParser, default_url: str) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw or to answer; - reads it from standard input")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default=default_url, help="of the server (default: %(default)s)")
    where.add_argument(
        "--local",
        metavar="SOURCE",
        help="a diffusion pipeline to run in this process, such as demo:image; it takes the flags of a dit MODEL of "
        "`omni-ray serve`, such as --enable-layerwise-cpu-offload",
    )
    parser.add_argument("--model", default="", help="of the server; may be left out where it has one")
    parser.add_argument("--api-key", default="", metavar="KEY", help="where the server asks for one")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="to edit or to animate")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="where to draw anew: transparent, or else white")
    parser.add_argument("--output", default=".", metavar="FILE|FOLDER", help="default: this folder, named by prompt")
    for name, (kind, metavar, text) in FIELDS.items():
        flags = [SHORT[name]] if name in SHORT else []
        parser.add_argument(*flags, f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=metavar, help=text)


def generate(arguments: argparse.Namespace) -> int:
    """Print text, write files and print their names. 0 when it is done, 130 when Ctrl-C has cancelled it.

    Raises:
        ConfigError: the command line asks for what the model does not do, or a file cannot be read or written.
        OmniRayError: what the server or the engine says.
    """
    asked, target = _asked(arguments), Path(arguments.output)
    if not _is_folder(arguments.output) and not target.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {target.parent}")
    updates: Generator[Update, None, None]
    if arguments.local:
        from omni_ray.cli.local import run

        updates = run(arguments.local, asked, arguments.flags)
    else:
        from omni_ray.cli.remote import Remote

        updates = Remote(arguments.url, arguments.api_key).run(asked)
    try:
        with closing(updates):
            outputs, cost = _show(updates)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    if outputs:
        for path in _write(outputs, arguments.output, asked.prompt, cost.get("seed")):
            print(path)
    if cost:
        print(_sentence(cost), file=sys.stderr)
    return 0


def _asked(arguments: argparse.Namespace) -> Asked:
    prompt = sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt
    fields = {name: getattr(arguments, name) for name in FIELDS if getattr(arguments, name) is not None}
    suffix = Path(arguments.output).suffix.lower()
    if not _is_folder(arguments.output):
        if suffix not in SUFFIXES:
            raise ConfigError(f"--output {arguments.output}: {suffix} is none of {', '.join(SUFFIXES)}")
        fields["output_format"] = SUFFIXES[suffix]
    for file in [*arguments.image, *([arguments.mask] if arguments.mask else [])]:
        if not file.is_file():
            raise ConfigError(f"{file}: there is no such file")
    if arguments.mask and not arguments.image:
        raise ConfigError("--mask says what of an image to draw anew; name it with --image")
    return Asked(prompt, arguments.model, fields, tuple(arguments.image), arguments.mask)


def _is_folder(output: str) -> bool:
    return output.endswith("/") or not Path(output).suffix or Path(output).is_dir()


def _show(updates: Iterable[Update]) -> tuple[list[Output], dict[str, Any]]:
    """Print what is for the eye, and return the rest. On a terminal there is a bar of the steps."""
    from tqdm import tqdm

    outputs: list[Output] = []
    cost: dict[str, Any] = {}
    with tqdm(desc="starting", unit="", disable=None, leave=False, bar_format="{desc} |{bar:30}| {unit}") as bar:
        for update in updates:
            match update:
                case Step():
                    _draw(bar, update)
                case Text():
                    bar.close()
                    print(update.text, end="", flush=True)
                case Caption():
                    bar.write(f"prompt: {update.text}", file=sys.stderr)
                case Output():
                    outputs.append(update)
                case Cost():
                    cost = update.omni
    return outputs, cost


def _draw(bar: Any, step: Step) -> None:
    bar.total, bar.n = step.num_steps or None, step.step
    bar.set_description_str(step.doing, refresh=False)
    steps = f"{step.step} of {step.num_steps} steps" if step.num_steps else ""
    left = "" if step.seconds_left is None else f"{step.seconds_left:.1f} s left"
    bar.unit = ", ".join(filter(None, (steps, left)))
    bar.refresh()


def _write(outputs: list[Output], target: str, prompt: str, seed: int | None) -> list[Path]:
    """The files of ``outputs``. In a folder no file is overwritten; a name that was said is."""
    paths = []
    for index, output in enumerate(outputs):
        if _is_folder(target):
            folder = Path(target)
            folder.mkdir(parents=True, exist_ok=True)
            words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "output"
            stem = "-".join([words, *([] if seed is None else [str(seed)])])
            suffix = next(suffix for suffix, format in SUFFIXES.items() if format == output.format)
            path = _free(folder, stem, suffix)
        else:
            path = Path(target)
            path = path if len(outputs) == 1 else path.with_stem(f"{path.stem}-{index}")
        path.write_bytes(output.data)
        paths.append(path)
    return paths


def _free(folder: Path, stem: str, suffix: str) -> Path:
    path, number = folder / f"{stem}{suffix}", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}{suffix}", number + 1
    return path


def _sentence(cost: dict[str, Any]) -> str:
    parts = [f"seed {cost['seed']}", f"{cost['steps_computed']} steps computed"]
    parts += [f"{cost['steps_skipped']} skipped"] if cost["steps_skipped"] else []
    parts += [f"{cost['device_s']:.2f} s on the device", f"{cost['queue_s']:.2f} s in the queue"]
    parts += [f"{cost['peak_memory_gib']:.1f} GiB at most"] if cost["peak_memory_gib"] else []
    return "\n".join([", ".join(parts), *(f"warning: {each}" for each in cost["warnings"])])
