"""Whether two answers are one."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
from PIL import Image

TOLERANCE = 0.5
"""Mean difference of the colour values (0 to 255): jobs that share forwards with other jobs than before differ in the
last bit here and there."""


def same(one: bytes, other: bytes) -> bool:
    """Equal as text, or as pictures within the tolerance."""
    if one == other:
        return True
    pictures = [_picture(each) for each in (one, other)]
    if pictures[0] is None or pictures[1] is None or pictures[0].shape != pictures[1].shape:
        return False
    return float(np.abs(pictures[0].astype(float) - pictures[1]).mean()) <= TOLERANCE


def _picture(data: bytes) -> np.ndarray | None:
    """An image, or the first frame of a video; None for text."""
    if data[4:8] == b"ftyp":
        with av.open(io.BytesIO(data)) as video:
            return next(video.decode(video=0)).to_ndarray(format="rgb24")
    if not data.startswith((b"\x89PNG", b"RIFF", b"\xff\xd8")):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError:
            return None
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError:
        return None
