"""The report of a tuning as one HTML file that needs no other, and its best profile as YAML."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from omni_ray.tuning.plots import plot_tuning
from omni_ray.tuning.tune import BASELINE, Row, Tuning

EDGE = 224
MOST_PROMPTS = 4
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
tr.best { background: #e8f5e9; font-weight: 600 }
tr.refused td { color: #888 }
.images { overflow-x: auto } .images img { width: 14rem; border-radius: 4px } .images td { vertical-align: top }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
"""


def write_report(tuning: Tuning, folder: Path) -> None:
    """``report.html`` and ``profile.yaml`` in ``folder``."""
    profile = profile_of(tuning)
    (folder / "profile.yaml").write_text(profile)
    plot = io.BytesIO()
    plot_tuning(tuning.rows, tuning.floor_psnr, plot)
    (folder / "report.html").write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(tuning.group.source)}, tuned</title><style>{STYLE}</style>"
        f"<h1>{escape(tuning.group.source)}</h1>"
        f"<p>{len(tuning.prompts)} prompts side by side on this machine. Speed-up, PSNR and SSIM are against the first "
        f"baseline (eager, native attention, nothing else). The profile is the fastest that keeps "
        f"{tuning.floor_psnr:g} dB.</p>"
        f"{_table(tuning)}<p><img alt='speed-up and PSNR of every setting' src='{_url(plot.getvalue(), 'png')}'></p>"
        f"<h2>The profile</h2><pre>{escape(profile)}</pre>"
        f"<h2>Images</h2><div class=images>{_images(tuning)}</div></html>\n"
    )


def profile_of(tuning: Tuning) -> str:
    """A file that serves the model by the best profile."""
    assert tuning.best is not None
    levers = BASELINE | tuning.best.levers
    model: dict[str, Any] = {"name": "tuned", "type": "dit", "source": tuning.group.source, **levers}
    application = {
        "name": "omni",
        "route_prefix": "/",
        "import_path": "omni_ray.app:build",
        "args": {"models": [model]},
    }
    return yaml.safe_dump({"applications": [application]}, sort_keys=False)


def _table(tuning: Tuning) -> str:
    heads = (
        "stage,setting,s an image,speed-up,PSNR dB,SSIM,steps skipped,peak GiB,offload hidden s,offload paid s,notes"
    )
    rows = "".join(_row(row, tuning) for row in tuning.rows)
    return f"<table><tr>{''.join(f'<th>{head}' for head in heads.split(','))}</tr>{rows}</table>"


def _row(row: Row, tuning: Tuning) -> str:
    if row.measured is None:
        return (
            f"<tr class=refused><td>{row.stage}<td>{escape(row.name)}<td colspan=9>refused: {escape(row.refused)}</tr>"
        )
    measured = row.measured
    numbers = (
        f"{measured.seconds / len(tuning.prompts):.2f}",
        f"{row.speed_up:.2f}",
        f"{row.psnr:.1f}",
        f"{row.ssim:.3f}",
        f"{measured.skipped:.0%}",
        f"{measured.peak_memory_gib:.1f}" if measured.peak_memory_gib else "",
        f"{measured.offload_hidden_s:.2f}",
        f"{measured.offload_paid_s:.2f}",
        escape("; ".join(measured.warnings)),
    )
    kind = " class=best" if row is tuning.best else ""
    return f"<tr{kind}><td>{row.stage}<td>{escape(row.name)}{''.join(f'<td>{each}' for each in numbers)}</tr>"


def _images(tuning: Tuning) -> str:
    shown = [row for row in tuning.rows if row.measured]
    heads = "".join(f"<th>{escape(row.name)}" for row in shown)
    lines = [f"<table><tr>{heads}</tr>"]
    for i, prompt in enumerate(tuning.prompts[:MOST_PROMPTS]):
        lines.append(f"<tr><td colspan={len(shown)}>{escape(prompt)}</tr><tr>")
        lines += [f"<td>{_picture(row, i, prompt)}" for row in shown]
        lines.append("</tr>")
    return "".join([*lines, "</table>"])


def _picture(row: Row, index: int, prompt: str) -> str:
    assert row.measured is not None
    return f"<img alt='{escape(prompt)}, {escape(row.name)}' src='{_url(_small(row.measured.images[index]), 'jpeg')}'>"


def _small(pixels: Any) -> bytes:
    """An image, or the middle of a video, as a small JPEG."""
    image = Image.fromarray(pixels if pixels.ndim == 3 else pixels[len(pixels) // 2])
    image.thumbnail((EDGE, EDGE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
